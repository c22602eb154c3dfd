"""Ranks and sizes of whatever was trained: an adapter of ours, one of stock PEFT's, or the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from peft.tuners.adalora import AdaLoraConfig, AdaLoraLayer, AdaLoraModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ranktune import adapters

_WRAPPER = "base_model.model."


def ranks(model: nn.Module) -> dict[str, int]:
    """Module name in the unwrapped model to its adapter's rank; empty where no adapter is."""
    ours = adapters.ranks(model)
    return ours or {name: rank for name, _, rank in _stock_layers(model)}


def active_parameters(model: nn.Module) -> int:
    """How many numbers the adapter has in use, without heads and other modules trained in full.

    AdaLoRA masks and does not shrink: of its components only those of the present ranks count. A model that is trained
    as a whole has all its trainable parameters in use.
    """
    found = list(_stock_layers(model))
    if not found:
        return adapters.active_parameters(model) or trainable_parameters(model)
    return sum(_own_parameters(layer) * rank // max(_capacity(layer), 1) for _, layer, rank in found)


def parameters_of_ranks(model: nn.Module) -> int:
    """How many numbers the adapter has in the components of its present ranks, without room for more."""
    ours = list(adapters.updates(model))
    if not ours:
        return active_parameters(model)
    return sum(update.parameters_at(update.rank) for _, update in ours)


def final_parameters(model: nn.Module) -> int:
    """Trainable parameters that the saved result has: all of them, without what AdaLoRA only masks."""
    masked = sum(
        _own_parameters(layer) * (_capacity(layer) - rank) // max(_capacity(layer), 1)
        for _, layer, rank in _stock_layers(model)
    )
    return trainable_parameters(model) - masked


def trainable_parameters(model: nn.Module) -> int:
    """Numbers that the optimizer moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _stock_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer, int]]:
    """Name, layer and present rank of every module that stock PEFT adapted."""
    decided = _adalora_ranks(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            short = name.removeprefix(_WRAPPER)
            yield short, layer, decided.get(short, _capacity(layer))


def _adalora_ranks(model: nn.Module) -> dict[str, int]:
    """What AdaLoRA's latest allocation kept of every module; its masks carry the adapter's name until it is saved."""
    tuner = next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)
    if tuner is None:
        return {}
    adapter = tuner.trainable_adapter_name
    masks = cast(AdaLoraConfig, tuner.peft_config[adapter]).rank_pattern or {}
    return {name.removesuffix(f".{adapter}").removesuffix(".lora_E"): sum(mask) for name, mask in masks.items()}


def _capacity(layer: LoraLayer) -> int:
    """Components that the layer has tensors for."""
    adapter = layer.active_adapters[0]
    return int(layer.lora_E[adapter].shape[0]) if isinstance(layer, AdaLoraLayer) else layer.r[adapter]


def _own_parameters(layer: LoraLayer) -> int:
    return sum(
        parameter.numel()
        for name, parameter in cast(nn.Module, layer).named_parameters()
        if parameter.requires_grad and not name.startswith("base_layer.")
    )
