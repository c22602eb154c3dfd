"""`ranktune evaluate OUT --ranks` as a function: the quality of a nested adapter at every rank, from one checkpoint."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import ranktune
from ranktune.errors import RecipeError
from ranktune.evaluation import Scorer, Split, rebuilt
from ranktune.plain_lora import TENSOR_FILE
from ranktune.rank_setting import at_rank, refuse_untrained_rank, trained_ranks
from ranktune.run import atomic
from ranktune.run.display import Display


@dataclass(frozen=True)
class RankPoint:
    """An adapter cut at a rank.

    Attributes:
        rank: b. scores: every score of the task.
        parameters: numbers in the adapter, without a head. adapter_bytes: of the file that `ranktune truncate` writes.
    """

    rank: int
    parameters: int
    adapter_bytes: int
    scores: dict[str, float]


@dataclass(frozen=True)
class RankCurve:
    """Quality against rank, ranks ascending.

    Attributes:
        metric: the task's main one, by which ranks are judged. greater_is_better: which way.
        split: what the scores are of. same_data: whether that is the data the run was trained and scored on.
    """

    metric: str
    greater_is_better: bool
    split: Split
    same_data: bool
    points: tuple[RankPoint, ...]

    def value(self, point: RankPoint) -> float:
        """The main score."""
        return point.scores[self.metric]

    @property
    def best(self) -> RankPoint:
        """The point with the best score, the smallest of them where several have it."""
        return min(self.points, key=lambda point: self._loss(point))

    def smallest_within(self, share: float) -> RankPoint:
        """The smallest rank whose score is within a share of the best one's size."""
        allowed = self._loss(self.best) + share * abs(self.value(self.best))
        return next(point for point in self.points if self._loss(point) <= allowed)

    def _loss(self, point: RankPoint) -> float:
        return -self.value(point) if self.greater_is_better else self.value(point)

    def as_csv(self) -> str:
        """One line a rank, with every score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = list(self.points[0].scores)
        writer.writerow(["rank", "parameters", "adapter_bytes", *names])
        for point in self.points:
            writer.writerow(
                [point.rank, point.parameters, point.adapter_bytes, *(point.scores[name] for name in names)]
            )
        return text.getvalue()


def rank_curve(output: Path, display: Display, ranks: str = "all", split: Split = "evaluation") -> RankCurve:
    """Score the run in `output` at several ranks. Nothing is written.

    Args:
        output: of a finished run with a nested adapter (dylora).
        ranks: "all" that were trained, or numbers with commas between them.

    Raises:
        RecipeError: there is no finished run, its recipe no longer works here, or `ranks` is no list of ranks.
        ConfigError: the adapter is not nested, or was not trained at one of the ranks.
        DataError: the run's data is gone.
    """
    wanted = None if ranks == "all" else _numbers(ranks)
    with rebuilt(output, display, split) as scorer:
        return curve_of(scorer, display, wanted)


def curve_of(scorer: Scorer, display: Display, ranks: Sequence[int] | None = None) -> RankCurve:
    """Score a rebuilt run at some ranks, or at all that were trained.

    Raises:
        ConfigError: the adapter is not nested, or was not trained at one of the ranks.
    """
    model, points = scorer.model, []
    for b in ranks or ():
        refuse_untrained_rank(model, b, "default")
    for b in ranks or trained_ranks(model):
        display.say(f"rank {b}")
        with at_rank(model, b):
            points.append(RankPoint(b, ranktune.active_parameters(model), _file_size(model), scorer.scores()))
    return RankCurve(
        metric=scorer.task.metric,
        greater_is_better=scorer.task.greater_is_better,
        split=scorer.split,
        same_data=scorer.same_data,
        points=tuple(points),
    )


def save_curve(curve: RankCurve, path: Path) -> None:
    """Write the curve as CSV, in one step."""
    atomic.write_text(path, curve.as_csv())


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise RecipeError(f"--ranks {text!r}: write 'all', or ranks with commas between them, such as 1,2,4.")
    return sorted({int(word) for word in words})


def _file_size(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        ranktune.export_lora(model, Path(scratch) / "plain")
        return (Path(scratch) / "plain" / TENSOR_FILE).stat().st_size
