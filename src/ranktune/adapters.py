"""Questions about the adapters on a model: their ranks, their sizes, and the optimizer groups they belong in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ranktune.layer import RankLayer
from ranktune.update import LowRankUpdate

# What PEFT puts before the names of the model's own modules.
_WRAPPER = "base_model.model."


def layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, RankLayer]]:
    """Every module's name in the unwrapped model that has this adapter, and its layer, in model order."""
    for name, layer in model.named_modules():
        if isinstance(layer, RankLayer) and adapter_name in layer.ranktune_update:
            yield name.removeprefix(_WRAPPER), layer


def updates(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, LowRankUpdate]]:
    """Every adapted module's name in the unwrapped model and one adapter's update on it, in model order.

    Args:
        model: a PEFT model, or any module with our layers in it.
        adapter_name: which adapter; the first active one by default.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, RankLayer):
            adapters = layer.active_adapters[:1] if adapter_name is None else [adapter_name]
            for adapter in adapters:
                if adapter in layer.ranktune_update:
                    yield name.removeprefix(_WRAPPER), layer.update_of(adapter)


def ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Module name to the rank of its adapter.

    Args:
        model: a PEFT model, or any module with our layers in it.
        adapter_name: which adapter; the first active one by default.
    """
    return {name: update.rank for name, update in updates(model, adapter_name)}


def total_rank(model: nn.Module, adapter_name: str | None = None) -> int:
    """The sum of `ranks`: how many rank-1 components the adapter has."""
    return sum(ranks(model, adapter_name).values())


def active_parameters(model: nn.Module, adapter_name: str | None = None) -> int:
    """How many numbers the adapter itself has in use, without heads and other fully trained modules."""
    return sum(update.parameters_in_use for _, update in updates(model, adapter_name))


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups for the trainable parameters of a model.

    Factors and the matrices of fully trained modules are decayed. Biases and normalisation weights, all of them
    one-dimensional, are not; nor is what an adapter names itself: decay would pull a magnitude away from the row norm
    it started at, and an expert's scalings away from one.

    Args:
        lr: learning rate of every group.
        weight_decay: of the decayed group.

    Returns:
        Groups for a ``torch.optim`` optimizer; empty ones are left out.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    undecayed = {id(parameter) for parameter in trainable if parameter.ndim <= 1}
    for update in model.modules():
        if isinstance(update, LowRankUpdate):
            undecayed.update(id(getattr(update, name)) for name in update.UNDECAYED)
    groups = [
        {"params": [p for p in trainable if id(p) not in undecayed], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in undecayed], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
