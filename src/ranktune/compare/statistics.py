"""What scores of a few seeds can tell: intervals, paired tests, and the Pareto front. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of `count` values and its 95 % t-interval, whose bounds are None where the values have no spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's width."""
        return None if self.high is None else self.high - self.mean


def t_interval(values: Sequence[float]) -> Interval:
    """``mean +- t(0.975, n - 1) s / sqrt(n)``: it covers the mean over seeds if scores are roughly normal over them.

    Fewer than two values, or equal ones, say nothing about their spread: an interval of no width would be certainty.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count, mean = len(values), float(np.mean(values))
    spread = _spread(values)
    if spread is None:
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * spread / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def _spread(values: Sequence[float]) -> float | None:
    """The standard deviation over values; None for fewer than two, or where it is nothing but rounding."""
    if len(values) < 2:
        return None
    spread = float(np.std(values, ddof=1))
    return spread if spread > 1e-12 * max(1.0, float(np.abs(values).max())) else None


@dataclass(frozen=True)
class PairedTest:
    """Differences of one method to another on the same seeds.

    Attributes:
        difference: their mean with its interval.
        p_t: two-sided paired t-test. None for fewer than two pairs, or where all differences are equal, which leaves
            the test nothing to compare them with.
        p_wilcoxon: exact two-sided signed-rank test; None where no difference is left after dropping zeros.
        smallest_wilcoxon: the smallest p that so many pairs can give.
    """

    difference: Interval
    p_t: float | None
    p_wilcoxon: float | None
    smallest_wilcoxon: float


def paired_test(scores: Sequence[float], reference: Sequence[float]) -> PairedTest:
    """Compare two methods seed by seed; the n-th scores of both belong to the same seed.

    Raises:
        ValueError: the lengths differ, or there is no pair.
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(reference)}")
    differences = np.subtract(scores, reference)
    count = len(differences)
    p_t, spread = None, _spread(differences.tolist())
    if spread is not None:
        t = abs(float(np.mean(differences))) * math.sqrt(count) / spread
        p_t = float(2 * stats.t.sf(t, count - 1))
    return PairedTest(t_interval(differences.tolist()), p_t, _signed_rank(differences), 2.0 ** (1 - count))


def _signed_rank(differences: np.ndarray) -> float | None:
    """Wilcoxon's two-sided p by going through all signs: exact with ties too, where tables are not."""
    moved = differences[np.abs(differences) > 1e-12]
    count = len(moved)
    if not count:
        return None
    ranks = stats.rankdata(np.abs(moved))
    if count > 20:  # a million signs; beyond, the normal approximation is good
        return float(stats.wilcoxon(moved)[1])  # pyright: ignore[reportArgumentType]
    signs = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    sums = signs @ ranks
    centre, found = ranks.sum() / 2, ranks[moved > 0].sum()
    return float(np.mean(np.abs(sums - centre) >= abs(found - centre) - 1e-9))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several tests at once; None stays None and counts as no test."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


def what_seeds_can_show(count: int) -> str:
    """In words, what a paired comparison over so many seeds can and cannot find."""
    if count < 2:
        return (
            "With one seed nothing can be said about chance: another seed may turn the order round. Use at least three "
            "(--seeds 3), better five."
        )
    spreads = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) / math.sqrt(count)
    smallest = 2.0 ** (1 - count)
    verdict = "so it can never call a difference significant at 5 %" if smallest > 0.05 else "at best"
    return (
        f"With {count} seeds the paired t-test calls a difference significant (5 %, before correction) only when its "
        f"mean exceeds {spreads:.2f} times its standard deviation over seeds, and it trusts that differences are "
        "roughly normal. The signed-rank test, which does not, cannot give less than "
        f"p = {smallest:.3g}, {verdict}. A difference that is not significant here is not shown to be absent."
    )


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Places that no other one beats: none costs at most as much and is worth at least as much, and one of them truly.

    Args:
        costs: lower is better. values: higher is better.

    Returns:
        Their places, by rising cost. Equal points are all on the front.
    """
    front = []
    for place, (cost, value) in enumerate(zip(costs, values, strict=True)):
        beaten = any(
            other_cost <= cost and other >= value and (other_cost < cost or other > value)
            for other_cost, other in zip(costs, values, strict=True)
        )
        if not beaten:
            front.append(place)
    return sorted(front, key=lambda place: (costs[place], -values[place]))
