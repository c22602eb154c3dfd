"""Scores to exact choices. Ties are broken by order, so that every process and every machine chooses the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_best(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Keep the highest scores whose costs fit a budget.

    Candidates are taken from the best down; one that no longer fits is passed over, and a cheaper one further down may
    still be taken. With equal costs exactly ``budget // cost`` are kept; in general what is left of the budget is less
    than the cheapest candidate that was not kept. Of equal scores the later one is kept first.

    Args:
        scores: [modules, components], finite.
        costs: [modules], the cost of one component of each module: ones for a budget in ranks.
        budget: how much the kept components may cost together.

    Returns:
        [modules, components] bool, on the CPU.
    """
    exact = scores.detach().to("cpu", torch.float64)
    order = torch.argsort(exact.flatten(), stable=True).flip(0)
    cost = costs.to("cpu", torch.int64).unsqueeze(1).expand_as(exact).flatten()[order]
    keep = torch.zeros(exact.numel(), dtype=torch.bool)
    if bool((cost == cost[:1]).all()):
        keep[order[: budget // int(cost[0])]] = True
    else:
        left = budget
        for position, price in zip(order.tolist(), cost.tolist(), strict=True):
            if price <= left:
                keep[position] = True
                left -= price
    return keep.view_as(exact)


def grow_best(scores: Tensor, room: Tensor, costs: Tensor, budget: int, count: int) -> Tensor:
    """Give components to the modules with the highest scores, without going over a budget.

    From the best down, ``count`` modules take all they have room for, or as many as the budget still pays for; a module
    that can take none is passed over and does not count. Of equal scores the earlier module comes first.

    Args:
        scores: [modules], finite. room: [modules], how many components each may take.
        costs: [modules], of one component: ones for a budget in ranks.
        budget: what all of them may cost together. count: how many modules take part, at most.

    Returns:
        [modules] int64, on the CPU: the components each module gets.
    """
    exact = scores.detach().to("cpu", torch.float64)
    grown = torch.zeros(exact.numel(), dtype=torch.int64)
    left = budget
    for module in torch.argsort(exact, descending=True, stable=True).tolist():
        if count == 0:
            break
        taken = min(int(room[module]), left // int(costs[module]))
        if taken > 0:
            grown[module] = taken
            left -= taken * int(costs[module])
            count -= 1
    return grown


def spend_best(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], spare: int) -> list[int]:
    """Raise modules from their smallest sizes, so that the errors' sum is small and what it costs within a budget.

    Steps are taken by the fall of the error for their cost, across as many sizes as are needed to see it (a size that
    gains little may lead to one that gains much: the lower convex hull of each module's errors); one that does not fit
    is passed over. What is left goes to single steps, the best that fits first, even where an error rises: in the end
    no module's next size would fit.

    Args:
        errors: for each module, of each of its sizes; finite. costs: the same, rising. Of equal steps the earlier
            module's comes first.
        spare: what may be spent beyond the smallest sizes.

    Returns:
        For each module, which of its sizes.
    """
    chosen, left = [0] * len(errors), spare
    steps = [
        (slope, module, start, end)
        for module, (error, cost) in enumerate(zip(errors, costs, strict=True))
        for slope, start, end in _hull(error, cost)
    ]
    for _, module, start, end in sorted(steps):
        price = costs[module][end] - costs[module][start]
        if chosen[module] == start and price <= left:
            chosen[module], left = end, left - price
    while fitting := [
        ((errors[m][now + 1] - errors[m][now]) / (costs[m][now + 1] - costs[m][now]), m)
        for m, now in enumerate(chosen)
        if now + 1 < len(costs[m]) and costs[m][now + 1] - costs[m][now] <= left
    ]:
        _, module = min(fitting)
        chosen[module] += 1
        left -= costs[module][chosen[module]] - costs[module][chosen[module] - 1]
    return chosen


def _hull(errors: Sequence[float], costs: Sequence[int]) -> list[tuple[float, int, int]]:
    """The falling part of the lower convex hull: slope, first and last size of each of its edges, steepest first."""
    edges, start = [], 0
    while start + 1 < len(errors):
        slope, negative_end = min(
            ((errors[end] - errors[start]) / (costs[end] - costs[start]), -end) for end in range(start + 1, len(errors))
        )
        if slope >= 0.0:
            break
        edges.append((slope, start, -negative_end))
        start = -negative_end
    return edges
