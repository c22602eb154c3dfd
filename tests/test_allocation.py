"""Schedules at the points the specification lists, and choices that are exact to the unit."""

from __future__ import annotations

import itertools

import pytest
import torch

from ranktune.allocation import keep_best
from ranktune.schedule import CubicPruning


def paper(total_steps: int, start: int = 12, target: int = 8, interval: int = 10) -> CubicPruning:
    return CubicPruning.over_run(start, target, total_steps, warmup_ratio=0.15, final_ratio=0.5, interval=interval)


def test_the_budget_at_the_specifications_points():
    schedule = CubicPruning.over_run(12_000, 8_000, 2_000, warmup_ratio=0.15, final_ratio=0.5, interval=10)
    assert (schedule.begin, schedule.end) == (300, 1000)
    assert [schedule.budget(step) for step in (0, 299, 300)] == [12_000] * 3
    assert schedule.budget(650) == 12_000 - 4_000 // 8  # half of the window: an eighth of the way
    assert schedule.budget(300 + 175) == 12_000 - 62  # a quarter: 1/64 of 4000 = 62.5, not yet the 63rd
    assert [schedule.budget(step) for step in (1000, 1001, 2000)] == [8_000] * 3


def test_slow_first_fast_last():
    schedule = paper(2000, 1200, 800)
    drops = [a - b for a, b in itertools.pairwise(schedule.budget(step) for step in range(300, 1001, 100))]
    assert drops == sorted(drops)
    assert drops[0] < drops[-1] / 10


@pytest.mark.parametrize("total_steps", [10, 37, 100, 997])
@pytest.mark.parametrize(("start", "target"), [(108, 72), (9, 8), (7, 7), (864, 577)])
def test_the_budget_never_rises_and_ends_exactly(total_steps, start, target):
    schedule = paper(total_steps, start, target)
    budgets = [schedule.budget(step) for step in range(total_steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == start
    assert budgets[-1] == target
    assert schedule.budget(schedule.end) == target


def test_events_fall_on_the_interval_and_on_the_last_step_of_the_window():
    schedule = paper(200, interval=12)
    assert (schedule.begin, schedule.end) == (30, 100)
    events = [step for step in range(201) if schedule.is_event(step)]
    assert events == [42, 54, 66, 78, 90, 100]


def test_exactly_as_many_as_the_budget_are_kept_whatever_the_ties():
    ones = torch.ones(6, dtype=torch.int64)
    for scores in (torch.zeros(6, 4), torch.ones(6, 4), torch.arange(24.0).view(6, 4) // 5):
        for budget in range(25):
            assert int(keep_best(scores, ones, budget).sum()) == budget


def test_the_best_are_kept_and_ties_go_to_the_later():
    scores = torch.tensor([[0.5, 0.1], [0.5, 0.9]])
    ones = torch.ones(2, dtype=torch.int64)
    assert keep_best(scores, ones, 1).tolist() == [[False, False], [False, True]]
    assert keep_best(scores, ones, 2).tolist() == [[False, False], [True, True]]
    assert keep_best(scores, ones, 3).tolist() == [[True, False], [True, True]]


def test_the_choice_does_not_depend_on_the_scores_dtype_or_device_order():
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(8, dtype=torch.int64)
    assert torch.equal(keep_best(scores, ones, 20), keep_best(scores.double(), ones, 20))


@pytest.mark.parametrize("seed", range(20))
def test_a_parameter_budget_is_kept_and_nearly_spent(seed):
    """What is left is less than the cheapest component that was not kept, and no better one was passed over in vain."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(7, 5, generator=generator)
    costs = torch.tensor([1537, 3841, 1537, 3841, 900, 1537, 1537])
    budget = int(torch.randint(1000, int(costs.sum()) * 5, (1,), generator=generator))
    kept = keep_best(scores, costs, budget)
    spent = int((kept.sum(1) * costs).sum())
    assert spent <= budget
    left_out = costs.unsqueeze(1).expand(7, 5)[~kept]
    assert budget - spent < int(left_out.min())
    # Greedy by score: a component left out did not fit beside the better ones that were kept.
    for module, component in (~kept).nonzero().tolist():
        better = kept & (scores > scores[module, component])
        assert int((better.sum(1) * costs).sum()) + int(costs[module]) > budget
