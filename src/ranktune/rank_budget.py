"""A rank for each module of a nested adapter under a budget of parameters: by its energies, or by a measured loss.

DyLoRA trains one rank for all modules at a time and is published with one rank for all; this is ours. A module keeps
its leading components, at the scale of the rank it gets, and gets a rank that was trained, the lowest at least.
"""

from __future__ import annotations

import heapq
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
from ranktune.rank_setting import at_rank, set_rank, trained_ranks


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
    """Module name to rank, greedily: from the lowest ranks up, the step that lowers a measured loss most for its price.

    A step is measured again only when it seems to be the best one, since what it gained earlier is usually more than
    what it gains now (lazy greedy, Minoux 1978). Once the evaluations are used up, the last gain known of a module
    decides, and each further step of it is taken to gain half as much.

    Args:
        measure: the loss of the model at the ranks that are set when it is called; lower is better.
        evaluations: how often it is called at most; at least once, and once for each module.

    Raises:
        ConfigError: as `choices_under`, or too few evaluations.
    """
    name = adapter_name or active_adapter(model)
    choices = choices_under(model, budget, name)
    modules = list(choices.ranks)
    if isinstance(evaluations, bool) or evaluations < len(modules) + 1:
        raise ConfigError(
            f"evaluations={evaluations!r} is too few: the lowest ranks are scored once and each of the {len(modules)} "
            f"modules is tried once, so give {len(modules) + 1} or more."
        )
    place, left, taken, used = dict.fromkeys(modules, 0), choices.spare, 0, 0

    def price(module: str) -> int | None:
        """Of its next step, where there is one that fits."""
        following = choices.costs[module][place[module] : place[module] + 2]
        return following[1] - following[0] if len(following) == 2 and following[1] - following[0] <= left else None

    def loss_at(module: str | None = None) -> float:
        """The loss as it is, or with one more step of a module."""
        nonlocal used
        used += 1
        raised = {} if module is None else {module: choices.ranks[module][place[module] + 1]}
        with at_rank(model, raised, name):
            return measure()

    with at_rank(model, {module: ranks[0] for module, ranks in choices.ranks.items()}, name):
        loss = loss_at()
        # (rise of the loss for the price, place in the model, the loss, how many steps had been taken); best first.
        queue: list[tuple[float, int, float, int]] = []
        for order, module in enumerate(modules):
            if (cost := price(module)) is not None:
                after = loss_at(module)
                queue.append(((after - loss) / cost, order, after, 0))
        heapq.heapify(queue)
        while queue:
            slope, order, after, known_at = heapq.heappop(queue)
            module = modules[order]
            if (cost := price(module)) is None:
                continue
            measuring = used < evaluations
            if measuring and known_at < taken:
                after = loss_at(module)
                heapq.heappush(queue, ((after - loss) / cost, order, after, taken))
                continue
            place[module] += 1
            left -= cost
            taken += 1
            loss = after
            set_rank(model, {module: choices.ranks[module][place[module]]}, name)
            heapq.heappush(queue, (slope if measuring else slope / 2, order, after, -1))
    return {module: choices.ranks[module][at] for module, at in place.items()}


def _nested(model: nn.Module, name: str) -> dict[str, NestedUpdate]:
    return {module: update for module, update in updates(model, name) if isinstance(update, NestedUpdate)}
