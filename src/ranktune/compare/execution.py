"""One run of a comparison from its claim to its record; what every process that shares the work does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ranktune.compare.grid import Run
from ranktune.compare.measuring import CostCallback
from ranktune.compare.record import failed, finished
from ranktune.compare.store import ATTEMPTS, Store
from ranktune.methods import DyLoraConfig
from ranktune.rank_curve import rank_curve, save_curve
from ranktune.run.directory import RunDirectory
from ranktune.run.display import SilentDisplay
from ranktune.training import train

Report = Callable[[int, int], None]
_REPORT_SECONDS = 0.5


def execute(run: Run, store: Store, report: Report) -> bool:
    """Train the run and write its record, unless another process has it or has finished it; whether it was trained.

    Args:
        report: is told the step and the number of steps, now and then.

    Raises:
        Whatever training raises. The process that called records it, as it does where this one is killed.
    """
    with store.claim(run) as mine:
        if not mine:
            return False
        tries = store.begin(run)
        if tries > ATTEMPTS:
            store.write(run, failed(run, f"the process was killed {ATTEMPTS} times while training this run", 0.0))
            return True
        store.write(run, _train(run, report))
        store.tidy(run)
        return True


def _train(run: Run, report: Report) -> dict[str, Any]:
    began = time.perf_counter()
    cost = CostCallback()
    recipe = run.recipe.model_copy(update={"train": _counting_tokens(run)})
    metrics = train(recipe, run.id, SilentDisplay(), overwrite=True, callbacks=[cost, _Reporter(report)])
    directory = RunDirectory(Path(run.recipe.output))
    if run.phase == "final" and run.recipe.method["name"] == DyLoraConfig.method_name:
        save_curve(rank_curve(directory.path, SilentDisplay()), directory.rank_curve)
    ranks = directory.read_ranks()["final"]
    return finished(run, metrics, directory.read_events(), ranks, cost, time.perf_counter() - began)


def _counting_tokens(run: Run) -> Any:
    trainer = {"include_num_input_tokens_seen": "non_padding", **run.recipe.train.trainer}
    return run.recipe.train.model_copy(update={"trainer": trainer})


class _Reporter(TrainerCallback):
    def __init__(self, report: Report) -> None:
        self._report = report
        self._said = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        now = time.monotonic()
        if now - self._said >= _REPORT_SECONDS:
            self._said = now
            self._report(state.global_step, state.max_steps)
