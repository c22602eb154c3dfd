"""`log.jsonl`: one event a line, each flushed when it happens, so that a crash loses at most the last line."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ranktune.baselines.reading import ranks as ranks_of
from ranktune.history import history_records
from ranktune.integrations.trainer import RankCallback, RunShape
from ranktune.run.atomic import finite


class EventLog:
    """Appends events to a file; `with` closes it.

    Args:
        path: the file.
        keep: cut the file back to so many bytes first, which is where a checkpoint was written.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self._file = path.open("a", encoding="utf-8")
        if keep is not None and keep < path.stat().st_size:
            self._file.truncate(keep)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, ...}`; numbers that JSON cannot hold become null."""
        self._file.write(json.dumps(finite({"event": event, **fields}), allow_nan=False) + "\n")
        self._file.flush()

    def settle(self) -> int:
        """Have everything on disk; how many bytes that is."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size


class EventCallback(TrainerCallback, ExportableState):
    """Writes the Trainer's logs, evaluations and rank changes to an `EventLog`, and remembers scores and time.

    Args:
        log: where to.
        ranks: the trainer's `RankCallback`.
        fingerprint: of the data.
        recipe: the run's, resolved. Checkpoints keep it, for it says what they were trained with, whatever becomes of
            `recipe.yaml`.
        resumed: the ``attributes`` that this callback left in the checkpoint that training goes on from; else empty.

    Attributes:
        before: the scores before training.
        latest_scores, latest_scores_step: the latest ones, and after how many steps.
    """

    def __init__(
        self, log: EventLog, ranks: RankCallback, fingerprint: str, recipe: dict[str, Any], resumed: dict[str, Any]
    ) -> None:
        self.log = log
        self.ranks = ranks
        self.fingerprint = fingerprint
        self.recipe = recipe
        self.before: dict[str, float] = resumed.get("before", {})
        self.latest_scores: dict[str, float] = resumed.get("latest_scores", {})
        self.latest_scores_step: int = resumed.get("latest_scores_step", -1)
        self._seconds: float = resumed.get("seconds", 0.0)
        self._began: float | None = None
        self._changes_written = 0
        self._shape: dict[str, Any] = {}

    def seconds(self) -> float:
        """Training time up to now, with that up to the checkpoint a run was resumed from; not what was repeated."""
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state(self) -> dict[str, Any]:
        """What a checkpoint's ``trainer_state.json`` keeps, as transformers wants it."""
        kept = {
            "before": self.before,
            "latest_scores": self.latest_scores,
            "latest_scores_step": self.latest_scores_step,
            "seconds": self.seconds(),
            "fingerprint": self.fingerprint,
            "recipe": self.recipe,
            "log_bytes": self.log.settle(),
            "shape": self._shape,
        }
        return {"args": {}, "attributes": kept}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Start the clock; changes of an earlier part of the run have been written."""
        self._shape = asdict(RunShape.of(args, state.max_steps, state.num_train_epochs))
        self._began = time.perf_counter()
        self._changes_written = len(self.ranks.history)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Stop the clock."""
        self._seconds, self._began = self.seconds(), None

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Every change of a module's rank in this step."""
        for change in history_records(self.ranks.history[self._changes_written :]):
            self.log.write("rank", **change)
            self._changes_written += 1

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """A step's loss, learning rate and gradient norm, with the total rank at that moment."""
        if not logs or "loss" not in logs:
            return  # scores come through on_evaluate, and the totals at the end through metrics.json
        names = ("loss", "learning_rate", "grad_norm", "epoch", "rank_budget")
        values = {name: logs[name] for name in names if name in logs}
        self.log.write("step", step=state.global_step, **values, total_rank=sum(ranks_of(model).values()))
        if self.ranks.routers is not None and (use := self.ranks.routers.latest):
            self.log.write("routers", step=state.global_step, modules={name: asdict(one) for name, one in use.items()})

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """The scores of an evaluation, under their own names.

        Scored once more after the last step, because it was compacted or is an earlier best: that is in the log's end.
        """
        again = self.latest_scores_step == state.global_step
        self.latest_scores = scores_only(metrics or {})
        self.latest_scores_step = state.global_step
        if again:
            return
        self.log.write("evaluation", step=state.global_step, **self.latest_scores)


def scores_only(metrics: dict[str, float]) -> dict[str, float]:
    """Trainer's evaluation result without the `eval_` prefix and without what it says about speed."""
    speeds = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return {name: value for name, value in plain.items() if name not in speeds}
