"""A rank for each module of a nested adapter under a budget of parameters: by its energies, or by a measured loss.

DyLoRA trains one rank for all modules at a time and is published with one rank for all; this is ours. A module keeps
its leading components, at the scale of the rank it gets, and gets a rank that was trained, the lowest at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ranktune.adapters import active_parameters, layers, updates
from ranktune.allocation import spend_best
from ranktune.attachment import active_adapter
from ranktune.cut_energy import cut_energy
from ranktune.errors import ConfigError
from ranktune.nested import NestedUpdate
from ranktune.rank_setting import at_rank, trained_ranks


@dataclass(frozen=True)
class Choices:
    """What a budget may be spent on.

    Attributes:
        ranks: module name to the ranks it may have, ascending. costs: to the parameters of its factors at each.
        spare: what is left of the budget when all have their lowest rank.
    """

    ranks: dict[str, list[int]]
    costs: dict[str, list[int]]
    spare: int

    def ranks_at(self, places: dict[str, int]) -> dict[str, int]:
        """Module name to rank, where modules have these places in their lists."""
        return {module: self.ranks[module][place] for module, place in places.items()}

    def equal_places(self) -> dict[str, int]:
        """The places of the largest rank for all modules that is within the budget."""
        least = sum(cost[0] for cost in self.costs.values())
        found = dict.fromkeys(self.ranks, 0)
        for b in sorted({rank for ranks in self.ranks.values() for rank in ranks}):
            places = {module: sum(rank <= b for rank in ranks) - 1 for module, ranks in self.ranks.items()}
            if sum(self.costs[module][place] for module, place in places.items()) - least <= self.spare:
                found = places
        return found

    def near(self, module: str, place: int) -> range:
        """The places of a module that are one step from this one, and this one."""
        return range(max(place - 1, 0), min(place + 2, len(self.ranks[module])))

    def spent_anew(self, places: dict[str, int], losses: dict[str, dict[int, float]]) -> dict[str, int]:
        """The places, out of those for which a loss is known, that are best within the budget if differences add up."""
        costs = [[self.costs[module][place] for place in known] for module, known in losses.items()]
        least = sum(cost[0] for cost in self.costs.values())
        spare = self.spare + least - sum(cost[0] for cost in costs)
        chosen = spend_best([list(known.values()) for known in losses.values()], costs, spare)
        return {module: list(losses[module])[place] for module, place in zip(places, chosen, strict=True)}


def choices_under(model: nn.Module, budget: int, adapter_name: str | None = None) -> Choices:
    """The ranks that an adapter's modules may have, and their prices.

    Args:
        budget: parameters that the adapter may have, without a head.

    Raises:
        ConfigError: the adapter is not nested, or the budget is below its lowest ranks.
    """
    name = adapter_name or active_adapter(model)
    trained = trained_ranks(model, name)
    ranks, costs = {}, {}
    for module, update in _nested(model, name).items():
        ranks[module] = [b for b in trained if b < update.capacity] + [update.capacity]
        price = update.lora_A.shape[1] + update.lora_B.shape[0]
        costs[module] = [b * price for b in ranks[module]]
    with at_rank(model, trained[0], name):
        least = active_parameters(model, name)
    with at_rank(model, trained[-1], name):
        most = active_parameters(model, name)
    if isinstance(budget, bool) or budget < least:
        raise ConfigError(
            f"a budget of {budget!r} parameters is below the {least:,} that this adapter has at rank {trained[0]}, the "
            f"lowest that was trained; at {trained[-1]} it has {most:,}."
        )
    return Choices(ranks, costs, budget - least)


def ranks_by_energy(model: nn.Module, budget: int, adapter_name: str | None = None) -> dict[str, int]:
    """Module name to rank, so that little of the whole update's energy is lost: the sum of ``||dW_r - dW_b||_F^2``.

    No data is needed. Of a weight-decomposed adapter this is the energy before the decomposition.

    Raises:
        ConfigError: as `choices_under`.
    """
    name = adapter_name or active_adapter(model)
    choices = choices_under(model, budget, name)
    errors = []
    for module, layer in layers(model, name):
        A, B, _ = layer.update_of(name).plain_factors(1.0, max(choices.ranks[module]))
        scales = [layer.update_of(name).plain_factors(layer.scaling[name], b)[2] for b in range(1, A.shape[0] + 1)]
        lost = cut_energy(A, B, torch.tensor(scales)).tolist()
        errors.append([lost[b - 1] for b in choices.ranks[module]])
    places = spend_best(errors, list(choices.costs.values()), choices.spare)
    return {module: ranks[place] for (module, ranks), place in zip(choices.ranks.items(), places, strict=True)}


def ranks_by_loss(
    model: nn.Module,
    budget: int,
    measure: Callable[[], float],
    evaluations: int,
    adapter_name: str | None = None,
) -> dict[str, int]:
    """Module name to rank, by exchanges from one rank for all, each kept only if it lowers a measured loss.

    It begins at the largest rank for all within the budget. In every round each module is tried one step lower and one
    higher; as if these differences added up, the budget is spent anew among the three. If the loss of that is no lower,
    half of its moves are tried, and half of those; when none helps, or the evaluations are used up, that was all. So
    the result is never worse than one rank for all, on what was measured; parameters that would not help are not spent.

    Args:
        measure: the loss of the model at the ranks that are set when it is called; lower is better.
        evaluations: how often it is called at most; at least for one round.

    Raises:
        ConfigError: as `choices_under`, or too few evaluations.
    """
    name = adapter_name or active_adapter(model)
    choices = choices_under(model, budget, name)
    round_size = 2 * len(choices.ranks) + 2
    if isinstance(evaluations, bool) or evaluations < round_size:
        raise ConfigError(
            f"evaluations={evaluations!r} is too few: each of the {len(choices.ranks)} modules is tried at a lower and "
            f"at a higher rank, so give {round_size} or more."
        )
    places, used = choices.equal_places(), 0

    def loss_at(places: dict[str, int]) -> float:
        nonlocal used
        used += 1
        with at_rank(model, choices.ranks_at(places), name):
            return measure()

    loss = loss_at(places)
    while used + round_size - 1 <= evaluations:
        near = {
            module: {at: loss if at == place else loss_at(places | {module: at}) for at in choices.near(module, place)}
            for module, place in places.items()
        }
        moved = choices.spent_anew(places, near)
        while moved != places and used < evaluations:
            after = loss_at(moved)
            if after < loss:
                break
            moved = choices.spent_anew(places, _half(near, places, moved, choices))
        else:
            break
        places, loss = moved, after
    return choices.ranks_at(places)


def _half(
    near: dict[str, dict[int, float]], places: dict[str, int], moved: dict[str, int], choices: Choices
) -> dict[str, dict[int, float]]:
    """`near`, where only the better half of the raised and of the lowered modules may still move."""

    def slope(module: str) -> float:
        price = choices.costs[module][moved[module]] - choices.costs[module][places[module]]
        return (near[module][moved[module]] - near[module][places[module]]) / price

    raised = sorted((m for m in places if moved[m] > places[m]), key=slope)
    lowered = sorted((m for m in places if moved[m] < places[m]), key=slope, reverse=True)
    kept = {*raised[: len(raised) // 2], *lowered[: len(lowered) // 2]}
    return {
        module: losses if module in kept else {places[module]: losses[places[module]]}
        for module, losses in near.items()
    }


def _nested(model: nn.Module, name: str) -> dict[str, NestedUpdate]:
    return {module: update for module, update in updates(model, name) if isinstance(update, NestedUpdate)}
