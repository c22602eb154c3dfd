"""Scores to exact choices. Ties are broken by order, so that every process and every machine chooses the same."""

from __future__ import annotations

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
