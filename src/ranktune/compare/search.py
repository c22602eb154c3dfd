"""Which learning rates of a method have to be tried, and which is best: a small grid that follows its best point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Points of the grid before it is extended, and how far it may be, in half decades from the centre.
START, LIMIT = 1, 3


@dataclass(frozen=True)
class Trial:
    """What a learning rate achieved on the validation part; None where the run failed or diverged.

    `score` is signed so that higher is better. `loss` decides between equal scores.
    """

    score: float | None
    loss: float | None

    @property
    def usable(self) -> bool:
        """Whether there is a finite score."""
        return self.score is not None and math.isfinite(self.score)


def learning_rate(centre: float, point: int) -> float:
    """The rate `point` half decades from the centre, to three digits, so that it is the same everywhere."""
    return float(f"{centre * 10 ** (point / 2):.3g}")


def best_point(trials: Mapping[int, Trial]) -> int | None:
    """The point of the highest score; of equal ones that of the lower loss, then the one nearest to the centre."""
    usable = {point: trial for point, trial in trials.items() if trial.usable}
    if not usable:
        return None

    def rank(point: int) -> tuple[float, float, int, int]:
        trial = usable[point]
        loss = trial.loss if trial.loss is not None and math.isfinite(trial.loss) else math.inf
        return (-(trial.score or 0.0), loss, abs(point), point)

    return min(usable, key=rank)


def points_to_try(trials: Mapping[int, Trial]) -> list[int]:
    """Every point that is wanted given what has been tried; nothing new in it means that the search has ended.

    It starts with one point on either side of the centre and grows by one on the side where the best point is its last,
    or downwards where none was usable, up to `LIMIT` on each side.
    """
    low, high = -START, START
    while True:
        wanted = range(low, high + 1)
        if any(point not in trials for point in wanted):
            return list(wanted)
        best = best_point({point: trials[point] for point in wanted})
        if (best is None or best == low) and low > -LIMIT:
            low -= 1
        elif best == high and high < LIMIT:
            high += 1
        else:
            return list(wanted)


def at_edge(trials: Mapping[int, Trial]) -> bool:
    """Whether the best point is the last one on its side, so that a better one may lie beyond."""
    best = best_point(trials)
    return best is not None and best in (min(trials), max(trials))
