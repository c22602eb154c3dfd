"""Which modules a recipe would adapt, found on a model without weights, and refusals of names that match nothing."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ranktune.adapters import updates
from ranktune.attachment import layout_of
from ranktune.baselines import Baseline
from ranktune.config import RankConfig
from ranktune.errors import RecipeError, did_you_mean
from ranktune.left_out import explain, is_all_linear, left_out
from ranktune.policy import Layout
from ranktune.unmatched import layers_of, missing_layers, unmatched_keys


@dataclass(frozen=True)
class PlannedModule:
    """One module that would be adapted: its name, weight shape [out, in], and its adapter.

    `rank` is that of the start, and `start` the parameters in its components; `parameters` are all that the optimizer
    holds, with the room for components that may be grown.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    start: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What a recipe would train.

    `compared` has the sizes of other methods' adapters on the same modules at the same ranks, where the method's own
    size invites the question. `layout` is what a policy has to know of the adapter; `other` counts trainable parameters
    outside it (a new head); `total` the model's with its adapter. `end`: the size that the ranks are moved to, in
    words; None where they are not moved, or it is not known yet. `left_out`: what `all-linear` does not reach, in a
    sentence; None for targets that were named. `quantised`: what is, in words.
    """

    modules: list[PlannedModule]
    layout: Layout
    adapter: int
    other: int
    total: int
    left_out: str | None = None
    compared: dict[str, int] | None = None
    end: str | None = None
    quantised: str | None = None

    @property
    def trainable(self) -> int:
        """Trainable parameters, adapter and others."""
        return self.adapter + self.other

    @property
    def start(self) -> int:
        """Parameters in the components that the adapter begins with."""
        return sum(module.start for module in self.modules)

    @property
    def rank(self) -> int:
        """The total rank."""
        return sum(module.rank for module in self.modules)


_PATTERNS = ("rank_pattern", "alpha_pattern")


def adaptable_modules(model: nn.Module) -> list[str]:
    """Names of the modules that an adapter can sit on."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def check_targets(config: RankConfig | Baseline, model: nn.Module) -> None:
    """Refuse names in the method's section that match no module of the model; every list entry must match.

    Raises:
        RecipeError: naming the entry, the closest module name, and the names there are.
    """
    linear = adaptable_modules(model)
    everything = [name for name, _ in model.named_modules() if name]
    # A baseline has only some of the fields.
    if not is_all_linear(config):
        _check_names("target_modules", getattr(config, "target_modules", None), linear, everything)
    for field in ("exclude_modules", "modules_to_save"):
        _check_names(field, getattr(config, field, None), everything, everything)
    for field in _PATTERNS:
        for key in unmatched_keys(f"'method.{field}'", getattr(config, field, None) or {}, linear):
            raise RecipeError(_no_match(field, key, linear, everything))
    if missing := missing_layers(getattr(config, "layers_to_transform", None), linear):
        raise RecipeError(
            f"'method.layers_to_transform' names layer {missing[0]}; this model's layers are {layers_of(linear)}."
        )


def refuse_idle_patterns(config: RankConfig | Baseline, adapted: Collection[str]) -> None:
    """Refuse ``rank_pattern`` and ``alpha_pattern`` for modules that get no adapter.

    Raises:
        RecipeError: naming the key.
    """
    for field in _PATTERNS:
        for key in unmatched_keys(field, getattr(config, field, None) or {}, adapted):
            raise RecipeError(
                f"'method.{field}' names '{key}', and no such module is adapted. Adapted modules end in: "
                f"{', '.join(_ends(adapted)[:20])}. Leave it out, or add it to 'method.target_modules'."
            )


def _check_names(field: str, names: Iterable[str] | str | None, known: list[str], everything: list[str]) -> None:
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise RecipeError(f"'method.{field}' is {names!r}, not a regular expression: {error}.") from error
        if not any(pattern.fullmatch(name) for name in known):
            short = did_you_mean(names, _ends(known))
            raise RecipeError(
                f"'method.{field}' is the text {names!r}, a regular expression that must match a whole module name, "
                f"and it matches none.{short} For names by their ends, write a list: [{', '.join(_ends(known)[:3])}]."
            )
        return
    for name in sorted(names or ()):
        if not any(full == name or full.endswith(f".{name}") for full in known):
            raise RecipeError(_no_match(field, name, known, everything))


def _no_match(field: str, name: str, known: list[str], everything: list[str]) -> str:
    ends = _ends(known)
    if any(full == name or full.endswith(f".{name}") for full in everything):
        return (
            f"'method.{field}' names '{name}', which is no linear layer and cannot be adapted. "
            f"Linear layers of this model end in: {', '.join(ends)}."
        )
    near = did_you_mean(name, ends) or did_you_mean(name, known)
    return f"'method.{field}' names '{name}', which no module of this model is called.{near} Names end in: " + (
        ", ".join(ends[:20]) + ("..." if len(ends) > 20 else ".")
    )


def _ends(names: Iterable[str]) -> list[str]:
    """The last parts of dotted names, each once, in order of appearance."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def plan(config: RankConfig, skeleton: nn.Module) -> Plan:
    """Put the adapter on a model without storage, and read off what it would train.

    Raises:
        RecipeError: PEFT or the method finds nothing to adapt, or something it cannot adapt.
    """
    shapes = {name: _shape(skeleton.get_submodule(name)) for name in adaptable_modules(skeleton)}
    unreached = left_out(skeleton) if is_all_linear(config) else []
    everything = sum(parameter.numel() for parameter in skeleton.parameters())
    try:
        with torch.device("meta"):
            model = peft.get_peft_model(cast(PreTrainedModel, skeleton), copy.deepcopy(config))
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"section 'method' cannot be put on this model: {error}") from error
    named = list(updates(model))
    refuse_idle_patterns(config, [name for name, _ in named])
    modules = [
        PlannedModule(name, shapes[name], update.rank, update.parameters_at(update.rank), _trainable(update))
        for name, update in named
    ]
    adapter = sum(module.parameters for module in modules)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Plan(
        modules,
        layout_of(named),
        adapter,
        _trainable(model) - adapter,
        total,
        left_out=explain(unreached, everything) if unreached else None,
        compared=_compared(config, modules),
    )


def _compared(config: RankConfig, modules: Iterable[PlannedModule]) -> dict[str, int] | None:
    total: Counter[str] = Counter()
    for module in modules:
        rows, columns = module.shape
        total.update(config.comparable_parameters(columns, rows, module.rank))
    return dict(total) or None


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = cast(torch.Tensor, module.weight)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
