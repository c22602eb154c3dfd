"""What a controller is attached to: an adapter and the optimizer that steps it; and what is refused there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ranktune.config import RankConfig
from ranktune.errors import ConfigError
from ranktune.layer import RankLayer
from ranktune.policy import Layout
from ranktune.update import LowRankUpdate

Named = Sequence[tuple[str, LowRankUpdate]]


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper, or the one given.

    Raises:
        ConfigError: DeepSpeed's optimizers, which own the parameters and do not run torch's step hooks.
    """
    # accelerate's wrapper is itself an Optimizer by class, but has no hooks.
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if type(optimizer).__module__.startswith("deepspeed") or "DeepSpeed" in type(optimizer).__name__:
        raise ConfigError(
            f"{type(optimizer).__name__} partitions the parameters and runs no step hooks: ranks cannot be moved under "
            "DeepSpeed. Use DDP or FSDP2 through accelerate."
        )
    return optimizer


def adapter_config(model: nn.Module, adapter_name: str) -> RankConfig:
    """The configuration of one of our adapters on a model.

    Raises:
        ConfigError: there is no adapter of that name, or it is not one of ours.
    """
    # A distributed wrapper has the PEFT model inside it.
    found = (getattr(module, "peft_config", None) for module in model.modules())
    configs: dict[str, Any] = next((configs for configs in found if isinstance(configs, dict)), {})
    config = configs.get(adapter_name)
    if not isinstance(config, RankConfig):
        raise ConfigError(
            f"the model has no ranktune adapter {adapter_name!r}; its adapters are {sorted(configs) or 'none'}."
        )
    return config


def active_adapter(model: nn.Module) -> str:
    """The name of the first active adapter of ours on a model.

    Raises:
        ConfigError: there is none.
    """
    for module in model.modules():
        if isinstance(module, RankLayer):
            return module.active_adapters[0]
    raise ConfigError("the model has no ranktune adapter: add one with peft.get_peft_model(model, config) first.")


def layout_of(named: Named, ranks: tuple[int, ...] | None = None) -> Layout:
    """What a policy has to know about an adapter.

    Args:
        named: its modules' names and updates, in model order; on the meta device too.
        ranks: see `Layout`.
    """
    costs = [update.lora_A.shape[1] + update.lora_B.shape[0] + 1 for _, update in named]
    return Layout(tuple(name for name, _ in named), torch.tensor(costs, dtype=torch.int64), ranks)


def refuse_unless_optimized(optimizer: Optimizer, named: Named) -> None:
    """Every trainable adapter parameter has to be in exactly one optimizer group.

    Raises:
        ConfigError: naming the first that is not.
    """
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for module, update in named:
        for name, parameter in update.named_parameters():
            if counts.get(id(parameter), 0) != 1:
                raise ConfigError(
                    f"{name} of {module} is in {counts.get(id(parameter), 0)} optimizer groups, not in one: make "
                    "the optimizer from ranktune.parameter_groups(model, lr, weight_decay) after the adapter was "
                    "added."
                )


def refuse_compacted(named: Named, config: RankConfig) -> None:
    """An adapter whose ranks are to move needs the components it started with.

    Raises:
        ConfigError: naming the first module that was compacted.
    """
    for name, update in named:
        if update.capacity != config.capacity:
            raise ConfigError(
                f"{name} has {update.capacity} components where a run starts with {config.capacity}: the adapter "
                "was compacted, and its ranks are final. Start from a checkpoint, or train it as it is without a "
                "controller."
            )
