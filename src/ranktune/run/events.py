"""`log.jsonl`: one event a line, each flushed when it happens, so that a crash loses at most the last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ranktune.baselines.reading import ranks as ranks_of
from ranktune.controller import history_records
from ranktune.integrations.trainer import RankCallback
from ranktune.run.atomic import finite


class EventLog:
    """Appends events to a file; `with` closes it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, ...}`; numbers that JSON cannot hold become null."""
        self._file.write(json.dumps(finite({"event": event, **fields}), allow_nan=False) + "\n")
        self._file.flush()


class EventCallback(TrainerCallback):
    """Writes the Trainer's logs, evaluations and rank changes to an `EventLog`, and remembers the latest scores."""

    def __init__(self, log: EventLog, ranks: RankCallback) -> None:
        self.log = log
        self.ranks = ranks
        self._changes_written = 0
        self.latest_scores: dict[str, float] = {}
        self.latest_scores_step = -1

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

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """The scores of an evaluation, under their own names."""
        self.latest_scores = scores_only(metrics or {})
        self.latest_scores_step = state.global_step
        self.log.write("evaluation", step=state.global_step, **self.latest_scores)


def scores_only(metrics: dict[str, float]) -> dict[str, float]:
    """Trainer's evaluation result without the `eval_` prefix and without what it says about speed."""
    speeds = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return {name: value for name, value in plain.items() if name not in speeds}
