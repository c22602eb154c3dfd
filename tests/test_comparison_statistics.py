"""Statistics of a comparison against independent computations: tables, scipy's own tests, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ranktune.compare.search import LIMIT, Trial, at_edge, best_point, learning_rate, points_to_try
from ranktune.compare.statistics import holm, paired_test, pareto_front, t_interval, what_seeds_can_show


def test_the_interval_is_the_textbooks() -> None:
    # Two-sided 97.5 % quantiles of Student's t from a printed table: 2 degrees of freedom 4.303, 4 of them 2.776.
    found = t_interval([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.half_width == pytest.approx(4.3027 * math.sqrt(7.0) / math.sqrt(3), rel=1e-4)
    assert found.low == pytest.approx(3.0 - (found.half_width or 0))
    assert t_interval([0.0, 0.0, 0.0, 0.0, 5.0]).half_width == pytest.approx(
        2.7764 * math.sqrt(5.0) / math.sqrt(5), rel=1e-4
    )
    one = t_interval([4.0])
    assert (one.mean, one.low, one.high, one.half_width, one.count) == (4.0, None, None, None, 1)
    for equal in ([0.7, 0.7, 0.7], [0.1 + 0.2, 0.3]):  # no spread, or one of rounding: no width would be certainty
        same = t_interval(equal)
        assert same.mean == pytest.approx(equal[0])
        assert (same.low, same.high, same.half_width, same.count) == (None, None, None, len(equal))
    assert t_interval([1e-6, 2e-6]).half_width == pytest.approx(12.706 * 0.5e-6, rel=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(5.0, 2.0, (4000, 3))
    covered = [(found.low or 0) <= 5.0 <= (found.high or 0) for found in map(t_interval, draws.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_paired_tests_are_scipys() -> None:
    draw = np.random.default_rng(1)
    for count in (2, 3, 5, 9):
        own, other = draw.normal(size=count), draw.normal(0.5, size=count)
        found = paired_test(own.tolist(), other.tolist())
        assert found.p_t == pytest.approx(stats.ttest_rel(own, other).pvalue, rel=1e-9)
        assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(own, other, method="exact").pvalue, rel=1e-9)
        assert found.difference.mean == pytest.approx(float(np.mean(own - other)))
        assert found.difference.count == count
        assert found.smallest_wilcoxon == pytest.approx(
            stats.wilcoxon(np.arange(1.0, count + 1), method="exact").pvalue
        )


def test_the_signed_rank_test_is_exact_with_ties() -> None:
    differences = [1.0, 1.0, -1.0, 2.0, 0.0]
    ranks = [2.0, 2.0, 2.0, 4.0]  # zero is dropped, three share ranks 1 to 3
    found = sum(rank for rank, difference in zip(ranks, differences, strict=False) if difference > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=4)]
    expected = np.mean([abs(total - 5.0) >= abs(found - 5.0) for total in sums])
    assert paired_test(differences, [0.0] * 5).p_wilcoxon == pytest.approx(expected)


def test_many_pairs_use_the_approximation() -> None:
    differences = np.random.default_rng(2).normal(0.3, size=40)
    assert paired_test(differences.tolist(), [0.0] * 40).p_wilcoxon == pytest.approx(stats.wilcoxon(differences).pvalue)


def test_equal_differences_give_no_t_test() -> None:
    same = paired_test([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (same.p_t, same.p_wilcoxon, same.difference.mean) == (None, None, 0.0)
    shifted = paired_test([0.6, 0.7, 0.8], [0.5, 0.6, 0.7])  # a spread of rounding only
    assert shifted.p_t is None
    assert shifted.p_wilcoxon == 0.25
    assert shifted.difference.mean == pytest.approx(0.1)
    assert (shifted.difference.low, same.difference.high) == (None, None)
    assert paired_test([0.5], [0.4]).p_t is None
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_test([1.0], [1.0, 2.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([None, None]) == [None, None]
    assert holm([]) == []


def test_the_pareto_front_is_what_brute_force_finds() -> None:
    draw = np.random.default_rng(3)
    for _ in range(50):
        costs, values = draw.integers(0, 6, 8).tolist(), draw.integers(0, 6, 8).tolist()
        expected = {
            place
            for place in range(8)
            if not any(
                (costs[o] <= costs[place] and values[o] > values[place])
                or (costs[o] < costs[place] and values[o] >= values[place])
                for o in range(8)
            )
        }
        front = pareto_front(costs, values)
        assert set(front) == expected
        assert [costs[place] for place in front] == sorted(costs[place] for place in front)
    assert pareto_front([1, 1, 2], [3, 3, 3]) == [0, 1]
    assert pareto_front([], []) == []


def test_what_three_seeds_can_show_is_said() -> None:
    words = what_seeds_can_show(3)
    assert "2.48 times" in words  # 4.303 / sqrt(3)
    assert "p = 0.25" in words
    assert "never call a difference significant" in words
    assert "p = 0.0312" in what_seeds_can_show(6)
    assert "never" not in what_seeds_can_show(6)
    assert "With one seed" in what_seeds_can_show(1)


def trials(**scores: float | None) -> dict[int, Trial]:
    """`m1=0.5` is half a decade below the centre."""
    return {int(name[1:]) * (-1 if name[0] == "m" else 1): Trial(score, None) for name, score in scores.items()}


def test_the_grid_follows_its_best_point() -> None:
    assert points_to_try({}) == [-1, 0, 1]
    assert points_to_try(trials(m1=0.1)) == [-1, 0, 1]
    assert points_to_try(trials(m1=0.1, p0=0.3, p1=0.2)) == [-1, 0, 1]  # the best is inside
    assert points_to_try(trials(m1=0.1, p0=0.2, p1=0.3)) == [-1, 0, 1, 2]
    assert points_to_try(trials(m1=0.3, p0=0.2, p1=0.1)) == [-2, -1, 0, 1]
    assert points_to_try(trials(m2=0.2, m1=0.3, p0=0.2, p1=0.1)) == [-2, -1, 0, 1]
    rising = trials(m1=0.1, p0=0.2, p1=0.3, p2=0.4, p3=0.5)
    assert points_to_try(rising) == [-1, 0, 1, 2, 3]  # bounded
    assert max(rising) == LIMIT
    assert at_edge(rising)
    assert not at_edge(trials(m1=0.1, p0=0.3, p1=0.2))
    failed = trials(m1=None, p0=None, p1=None)
    assert points_to_try(failed) == [-2, -1, 0, 1]  # smaller steps may still work
    assert points_to_try({**failed, **trials(m2=None, m3=None)}) == [-3, -2, -1, 0, 1]
    assert not at_edge(failed)


def test_ties_go_to_the_lower_loss_and_then_to_the_centre() -> None:
    equal = {point: Trial(0.5, 1.0) for point in (-1, 0, 1)}
    assert best_point(equal) == 0
    assert best_point({**equal, 1: Trial(0.5, 0.9)}) == 1
    assert best_point({**equal, -1: Trial(float("nan"), 0.1)}) == 0
    assert best_point({0: Trial(0.5, None), 1: Trial(0.5, 2.0)}) == 1
    assert best_point({0: Trial(None, None)}) is None


def test_learning_rates_are_the_same_everywhere() -> None:
    assert [learning_rate(1e-3, point) for point in (-2, -1, 0, 1, 2)] == [1e-4, 0.000316, 0.001, 0.00316, 0.01]
