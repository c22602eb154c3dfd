"""What a baseline would train, found on a model without weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ranktune.baselines.base import Baseline
from ranktune.baselines.reading import active_parameters, ranks, trainable_parameters
from ranktune.errors import RecipeError
from ranktune.policy import Layout
from ranktune.run.targets import Plan, PlannedModule, refuse_idle_patterns


def baseline_plan(config: Baseline, skeleton: nn.Module) -> Plan:
    """Put the baseline on a model without storage, and read off what it would train.

    Raises:
        RecipeError: PEFT finds nothing to adapt, or something it cannot adapt.
    """
    try:
        with torch.device("meta"):
            model = config.put_on(skeleton)
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"section 'method' cannot be put on this model: {error}") from error
    refuse_idle_patterns(config, list(ranks(model)))
    modules = []
    for name, rank in ranks(model).items():
        layer = model.get_submodule(f"base_model.model.{name}")
        shape = cast(int, layer.out_features), cast(int, layer.in_features)
        count = active_parameters(layer)
        modules.append(PlannedModule(name, shape, rank, count, count))
    adapter = sum(module.parameters for module in modules)
    total = sum(parameter.numel() for parameter in model.parameters())
    layout = Layout(tuple(module.name for module in modules), torch.empty(0, dtype=torch.int64))
    return Plan(modules, layout, adapter, trainable_parameters(model) - adapter, total)
