"""What a person sees while a model trains: a live bar on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ranktune.baselines.reading import parameters_of_ranks
from ranktune.baselines.reading import ranks as ranks_of
from ranktune.integrations.trainer import RankCallback
from ranktune.run.events import scores_only


@dataclass
class Pace:
    """Where training stands: `loss` as it was last logged, at step `logged`, total rank, examples per second."""

    step: int = 0
    total: int = 0
    loss: float | None = None
    logged: int = 0
    rank: int | None = None
    speed: float | None = None

    def words(self) -> str:
        """The loss, rank and speed, as far as they are known."""
        when = "" if self.logged == self.step else f" at step {self.logged}"
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}{when}"]
        parts += [] if self.rank is None else [f"rank {self.rank}"]
        parts += [] if self.speed is None else [f"{self.speed:,.0f} samples/s"]
        return "  ".join(parts)


class Display(Protocol):
    """A place to show progress."""

    def pace(self, pace: Pace) -> None:
        """Show where training stands."""
        ...

    def evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is; `done == total` ends it."""
        ...

    def say(self, line: str) -> None:
        """Print a line that stays."""
        ...


class SilentDisplay:
    """Shows nothing (`--quiet`)."""

    def pace(self, pace: Pace) -> None:
        """Nothing."""

    def evaluating(self, done: int, total: int) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


class LiveDisplay:
    """Bars that move in place, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
        )
        self._training = self._progress.add_task("training", total=None, words="", visible=False)
        self._evaluating = self._progress.add_task("evaluating", total=None, words="", visible=False)
        self._progress.start()

    def pace(self, pace: Pace) -> None:
        """Move the training bar."""
        self._progress.update(self._training, completed=pace.step, total=pace.total, words=pace.words(), visible=True)

    def evaluating(self, done: int, total: int) -> None:
        """Show a second bar for as long as an evaluation lasts."""
        if done == 1:
            self._progress.reset(self._evaluating, total=total)
        self._progress.update(self._evaluating, completed=done, visible=done < total)

    def say(self, line: str) -> None:
        """Print above the bars."""
        self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Remove the bars."""
        self._progress.stop()


class PlainDisplay:
    """Lines for a log file: every tenth of the run, and at least every half minute."""

    def __init__(self, console: Console, seconds: float = 30.0) -> None:
        self._console = console
        self._seconds = seconds
        self._said = time.monotonic()
        self._tenth = 0
        self._started: tuple[float, int] | None = None

    def pace(self, pace: Pace) -> None:
        """Print a line when it is time for one."""
        now = time.monotonic()
        if self._started is None:
            self._started = now, pace.step
        tenth = 10 * pace.step // max(pace.total, 1)
        since, first = self._started
        if pace.step == first or (tenth == self._tenth and now - self._said < self._seconds):
            return
        self._tenth, self._said = tenth, now
        left = (now - since) / (pace.step - first) * (pace.total - pace.step)
        self.say(f"step {pace.step}/{pace.total}  {pace.words()}  {clock(left)} left")

    def evaluating(self, done: int, total: int) -> None:
        """Nothing: the scores follow."""

    def say(self, line: str) -> None:
        """Print the line whole, however long."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def showing(console: Console, quiet: bool) -> Iterator[Display]:
    """Bars on a terminal, lines elsewhere, nothing when quiet; the terminal is given back whatever happens inside."""
    if quiet:
        yield SilentDisplay()
    elif not console.is_terminal:
        yield PlainDisplay(console)
    else:
        live = LiveDisplay(console)
        try:
            yield live
        finally:
            live.close()


def clock(seconds: float) -> str:
    """`75` -> `1:15`; hours only when there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class DisplayCallback(TrainerCallback):
    """Feeds a `Display` from the Trainer, in place of Trainer's own bars and prints."""

    def __init__(self, display: Display, metric: str | None, ranks: RankCallback | None = None) -> None:
        """`metric`: the score to print after every evaluation, or None to print none. `ranks`: moves them."""
        self._display = display
        self._metric = metric
        self._ranks = ranks
        self._moves_shown = 0
        self._pace = Pace()
        self._step_began = 0.0
        self._seconds_per_step: float | None = None
        self._evaluated = 0
        self._scores_said = ""

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Learn the number of steps, and say what training goes on with, once the checkpoint is loaded."""
        self._pace = Pace(step=state.global_step, total=state.max_steps)
        self._read_rank(model)
        logged = [entry for entry in state.log_history if "loss" in entry]
        if logged:  # before the checkpoint that training goes on from
            self._pace.loss, self._pace.logged = logged[-1]["loss"], int(logged[-1]["step"])
        if state.global_step:
            self._say_what_was_restored(state.global_step, model)
        self._display.pace(self._pace)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Start the clock: evaluations and checkpoints do not count as training speed."""
        self._step_began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Move the bar by one optimizer step; where its loss is about to be logged, once it has been."""
        seconds = time.perf_counter() - self._step_began
        smooth = self._seconds_per_step
        self._seconds_per_step = seconds if smooth is None else 0.9 * smooth + 0.1 * seconds
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._pace.step, self._pace.speed = state.global_step, examples / self._seconds_per_step
        self._follow_rank()
        if not control.should_log:
            self._display.pace(self._pace)

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Learn the loss, and look at the ranks."""
        if logs and "loss" in logs:
            self._pace.loss, self._pace.logged = logs["loss"], state.global_step
            self._read_rank(model)
            self._display.pace(self._pace)

    def on_prediction_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Move the evaluation's bar by one batch."""
        self._evaluated += 1
        self._display.evaluating(self._evaluated, len(eval_dataloader))

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Print the scores."""
        self._evaluated = 0
        if self._metric is None:
            return
        scores = scores_only(metrics or {})
        when = "before training" if state.global_step == 0 else f"step {state.global_step}"
        words = f"{self._metric} {scores[self._metric]:.4f}" if self._metric in scores else ""
        loss = f"evaluation loss {scores['loss']:.4f}" if "loss" in scores else ""
        line = "  ".join(part for part in (f"{when}:", words, loss) if part)
        # The model is scored once more after it was compacted, which seldom shows.
        if line != self._scores_said:
            self._display.say(line)
        self._scores_said = line

    def _read_rank(self, model: Any) -> None:
        """Look at the model."""
        ranks = ranks_of(model)
        self._pace.rank = sum(ranks.values()) if ranks else None
        self._moves_shown = 0 if self._ranks is None else len(self._ranks.history)

    def _follow_rank(self) -> None:
        """Add the changes since the model was last looked at: on a GPU, looking would make every step wait."""
        if self._ranks is not None and self._pace.rank is not None:
            new = self._ranks.history[self._moves_shown :]
            self._pace.rank += sum(change.new - change.old for change in new)
            self._moves_shown += len(new)

    def _say_what_was_restored(self, step: int, model: Any) -> None:
        if ranks := ranks_of(model):
            self._display.say(
                f"restored at step {step:,}: {len(ranks)} modules of total rank {sum(ranks.values()):,}, "
                f"{parameters_of_ranks(model):,} adapter parameters"
            )
