"""`start_from`: a saved adapter, stock PEFT's or ours, as the point where training starts, with its ranks kept.

At step 0 the model computes what it does with that adapter in stock PEFT. How its factors come in depends on what the
method makes of components:

- ``lora`` and ``dora`` take A and B as they are, every module at its own rank (AdaLoRA's E goes into B);
- ``dylora``, whose leading components have to work alone, takes them by falling singular value;
- ``dynamic-dora`` and ``increlora``, which prune and add single components, take singular vectors as A and B and the
  singular values as gates. Pruning starts every module at the largest rank of the adapter, with gates of zero where a
  module has fewer. Growth starts all modules at one rank: an adapter of several is refused;
- ``mor`` is refused: its experts start apart from one another, and no such start adds what the adapter does.

Magnitudes come from a DoRA; an adapter without them gets those of ``W + s B A``, which change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import peft
import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ranktune.adapter_file import CONFIG_FILE, adapter_folder, read_adapter
from ranktune.adapters import layers
from ranktune.config import METHODS, PEFT_TYPE, RankConfig, is_count
from ranktune.errors import AdapterFileError, ConfigError, did_you_mean
from ranktune.methods import DyLoraConfig, DynamicDoraConfig, IncreLoraConfig, MorConfig
from ranktune.peft_compat import FILE_PREFIX, feature_counts
from ranktune.plain_lora import exact_pattern
from ranktune.recompression import singular_form
from ranktune.saved_adapter import SavedAdapter, SavedModule, load_saved_adapter
from ranktune.update import LowRankUpdate

# What would add to, or take from, the modules of the adapter.
_TARGETING = ("exclude_modules", "layers_to_transform", "layers_pattern")

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Start:
    """A saved adapter to start from.

    Attributes:
        saved: all of it. modules: those that have components or a magnitude.
    """

    saved: SavedAdapter
    modules: dict[str, SavedModule]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.saved.file.path

    @property
    def decomposed(self) -> bool:
        """Whether it has magnitudes (DoRA)."""
        return any(module.magnitude is not None for module in self.modules.values())

    @property
    def base_model(self) -> str | None:
        """What its configuration says it was trained on."""
        return self.saved.file.config.get("base_model_name_or_path")

    @property
    def heads(self) -> list[str]:
        """Names of the modules trained in full that are in the file."""
        names = self.saved.file.config.get("modules_to_save") or []
        return [name for name in names if any(f".{name}." in key for key in self.saved.others)]


def read_start(folder: str | Path) -> Start:
    """Read and check an adapter's folder, or that of the run whose output directory is given.

    Raises:
        AdapterFileError: it cannot be read, has no components, or its factors are not all that it adds.
        ConfigError: its update depends on the input.
    """
    saved = load_saved_adapter(read_adapter(adapter_folder(folder)))
    saved.require_unchanged_base()
    modules = {
        name: module
        for name, module in saved.modules.items()
        if module.factors()[0].shape[0] or module.magnitude is not None
    }
    if not modules:
        raise AdapterFileError(f"{saved.file.tensor_file}: every module has rank 0, so there is nothing to start from.")
    start = Start(saved, modules)
    for name in saved.others:
        if not any(f".{head}." in name for head in start.heads):
            raise AdapterFileError(
                f"{saved.file.tensor_file} holds {name.removeprefix(FILE_PREFIX)}, trained beside the adapter, and "
                "modules_to_save in its configuration does not name it."
            )
    return start


def start_fields(start: Start, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a method's configuration that follow from the adapter.

    Args:
        start: from `read_start`. method: the method's name.
        given: fields that were set; those that follow must be missing, empty or the same.

    Returns:
        Ranks, scales and modules; whether it is weight-decomposed; the modules trained in full.

    Raises:
        ConfigError: the method cannot start from such an adapter, or a field contradicts it.
    """
    kind = METHODS[method]
    decomposed = bool(given.get("use_dora", kind.method_name == "dora"))
    if obstacle := _obstacle(start, kind, decomposed):
        raise ConfigError(f"init_from={str(start.folder)!r} {obstacle} {_ways(start)}")
    _refuse_target(start, kind, given)
    fields = _ranks(start, kind)
    rslora = bool(given.get("use_rslora", start.saved.file.config.get("use_rslora")))
    ranks = {name: fields.get("init_r") or rank for name, rank in _own_ranks(start).items()}
    alphas = {
        name: _tidy(module.factors()[2] * (ranks[name] ** 0.5 if rslora else ranks[name]))
        for name, module in start.modules.items()
    }
    alpha = _most_common(alphas)
    fields |= {
        "lora_alpha": alpha,
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(start.modules),
        **dict.fromkeys(_TARGETING),
    }
    for name, value in fields.items():
        found = given.get(name)
        listed = name == "target_modules" and isinstance(found, (list, set))
        same = set(found or ()) == set(value) if listed else found == value
        if found not in (None, {}, []) and not same:
            raise ConfigError(
                f"{name}={found!r} contradicts init_from={str(start.folder)!r}, which is taken as it is: "
                f"{name}={value!r}. Leave {name} out."
            )
    heads = [*(given.get("modules_to_save") or []), *start.heads]
    extra = {"use_rslora": rslora, "modules_to_save": list(dict.fromkeys(heads)) or None}
    return {**fields, **extra, **({"use_dora": True} if start.decomposed else {})}


def _obstacle(start: Start, kind: type[RankConfig], decomposed: bool) -> str | None:
    """What keeps a method, with magnitudes or without, from starting at the adapter."""
    if issubclass(kind, MorConfig):
        return (
            "cannot be where mor starts: its experts are scalings of one pair of factors that must start apart from "
            "one another, so the model would not be what the adapter made of it."
        )
    if start.decomposed and not decomposed:
        return f"is a DoRA: its magnitudes belong to it, and {kind.method_name} without use_dora would drop them."
    ranks = _own_ranks(start).values()
    if issubclass(kind, IncreLoraConfig) and min(ranks) < max(ranks):
        return (
            f"has modules of ranks {min(ranks)} to {max(ranks)}, and increlora starts all of them at one (init_r) and "
            "decides itself who gets more."
        )
    return None


def _ways(start: Start) -> str:
    """Which methods can start there, and what they need for it."""
    highest, ways = max(_own_ranks(start).values()), []
    for name, kind in METHODS.items():
        if _obstacle(start, kind, decomposed=True) or (start.decomposed and kind is RankConfig):
            continue  # a lora with magnitudes is a dora
        needs = ["use_dora: true"] if start.decomposed and name != "dora" else []
        if issubclass(kind, DynamicDoraConfig):
            if highest == 1:
                continue  # nothing to prune
            needs.append(f"r below {highest}")
        if issubclass(kind, IncreLoraConfig):
            needs.append(f"r above {highest}")
        ways.append(f"{name} ({', '.join(needs)})" if needs else name)
    said = f"What can start there: {', '.join(ways)}."
    if start.decomposed and start.saved.file.config["peft_type"] == PEFT_TYPE:
        said += f" Or make a LoRA of it first, at a loss: ranktune export {start.folder} --svd-rank {highest}"
    return said


def _refuse_target(start: Start, kind: type[RankConfig], given: Mapping[str, Any]) -> None:
    """A mean rank at the end that pruning or growth cannot reach from the adapter's ranks."""
    r, highest = given.get("r", kind.r), max(_own_ranks(start).values())
    if not is_count(r):
        return  # refused with the other fields
    where = f"init_from={str(start.folder)!r} has rank {highest}"
    if issubclass(kind, DynamicDoraConfig) and r > highest:
        raise ConfigError(
            f"{where}, and dynamic-dora prunes from there to a mean rank of r={r}: set r below {highest}."
        )
    if issubclass(kind, IncreLoraConfig) and r < highest and given.get("target_params") is None:
        raise ConfigError(f"{where}, and increlora grows from there to a mean rank of r={r}: set r above {highest}.")


def _own_ranks(start: Start) -> dict[str, int]:
    """Module name to rank; a module that has only its magnitude gets a component that adds nothing yet."""
    return {name: max(1, module.factors()[0].shape[0]) for name, module in start.modules.items()}


def _ranks(start: Start, kind: type[RankConfig]) -> dict[str, Any]:
    """The fields that say what rank each module starts at."""
    ranks = _own_ranks(start)
    high = max(ranks.values())
    if not kind.gated:
        r = high if issubclass(kind, DyLoraConfig) else _most_common(ranks)
        return {"r": r, "rank_pattern": _pattern(ranks, r)}
    return {"init_r": high}


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    return cast("dict[str, Number]", exact_pattern(cast("dict[str, int]", values), cast(int, default)))


def _most_common(values: Mapping[str, Number]) -> Number:
    return Counter(values.values()).most_common(1)[0][0]


def _tidy(alpha: float) -> float:
    """Without the rounding of a division and its inverse."""
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-12 * abs(alpha) else alpha


def refuse_other_model(start: Start, model: nn.Module, name: str) -> None:
    """Check that a base model, with or without storage, has the modules of the adapter, in their shapes.

    Args:
        start: from `read_start`. model: the base model. name: its name, for the message.

    Raises:
        AdapterFileError: naming a module that is not there, or is another.
    """
    found = {key: module for key, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    found |= {key: module for key, module in model.named_modules() if key in start.modules}
    trained_on = f"it was trained on {start.base_model!r}" if start.base_model else "it names no base model"
    where = f"{start.folder / CONFIG_FILE}: the adapter does not belong to the model {name!r} ({trained_on}): "
    if missing := [key for key in start.modules if key not in found]:
        raise AdapterFileError(
            f"{where}{len(missing)} of its {len(start.modules)} modules are not there, such as {missing[0]}."
            f"{did_you_mean(missing[0], found)}"
        )
    for key, module in start.modules.items():
        inputs, outputs = feature_counts(found[key])
        if (outputs, inputs) != module.shape:
            raise AdapterFileError(
                f"{where}{key} maps {inputs} features to {outputs} there, and the adapter's factors {module.shape[1]} "
                f"to {module.shape[0]}."
            )
    own = {f"{FILE_PREFIX}{key}": tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, tensor in start.saved.others.items():
        if own.get(key) != tuple(tensor.shape):
            raise AdapterFileError(
                f"{where}{key.removeprefix(FILE_PREFIX)}, trained in full beside it, has shape {list(tensor.shape)}, "
                f"and here {'there is none' if key not in own else list(own[key])}."
            )


@torch.no_grad()
def load_start(model: nn.Module, start: Start, adapter_name: str = "default") -> None:
    """Give a fresh adapter, made with `start_fields`, the values of the saved one. No random number is drawn.

    Raises:
        ConfigError: the adapter on the model is on other modules.
    """
    adapted = dict(layers(model, adapter_name))
    if set(adapted) != set(start.modules):
        names = sorted(set(adapted) ^ set(start.modules))
        raise ConfigError(
            f"init_from={str(start.folder)!r} and the new adapter are not on the same modules: {names[0]}."
        )
    for name, layer in adapted.items():
        saved, update, scale = start.modules[name], layer.update_of(adapter_name), layer.scaling[adapter_name]
        _fill(update, *saved.factors(), scale)
        if saved.magnitude is not None and update.lora_magnitude_vector is not None:
            update.lora_magnitude_vector.copy_(saved.magnitude)
        elif update.decomposed:
            update.init_magnitude(layer.frozen().weight, scale)
    if start.saved.others:
        set_peft_model_state_dict(cast(PeftModel, model), dict(start.saved.others), adapter_name=adapter_name)


def _fill(update: LowRankUpdate, A: Tensor, B: Tensor, scale: float, own_scale: float) -> None:
    """Components that the update has beyond those of A and B keep the start their method gave them, and add nothing."""
    if A.shape[0] == 0:
        update.lora_B.zero_()
        return
    B = B * (scale / own_scale)
    if update.gate is not None:
        form = singular_form(A.double(), B.double())
        A, B = form.right, form.left
        update.gate.zero_()
        update.gate[: len(form.values)] = form.values.to(update.gate)
    elif type(update) is not LowRankUpdate:
        form = singular_form(A.double(), B.double())
        A, B = form.factors(len(form.values))
        update.lora_B.zero_()
    update.lora_A[: A.shape[0]] = A.to(update.lora_A)
    update.lora_B[:, : B.shape[1]] = B.to(update.lora_B)


def start_from(
    base: nn.Module, folder: str | Path, method: str = "lora", adapter_name: str = "default", **fields: Any
) -> PeftModel:
    """Put an adapter of ours on a base model that starts where a saved one ended.

    Args:
        base: the base model that the saved adapter was trained on, or one of its shape; it is changed, as by
            ``peft.get_peft_model``.
        folder: of a LoRA, DoRA or AdaLoRA of stock PEFT, or of an adapter of ours; or a run's output directory.
        method: what trains it from now on.
        adapter_name: of the new adapter.
        fields: of the method's configuration, but for those that the saved adapter decides: ranks, scale, modules.

    Returns:
        A model that computes what the base does with the saved adapter in stock PEFT, ready to be trained.

    Raises:
        AdapterFileError: the folder cannot be read, or does not belong to this model.
        ConfigError: the method cannot start from such an adapter, or a field contradicts it.
    """
    if method not in METHODS:
        raise ConfigError(
            f"method={method!r} is not one of {', '.join(sorted(METHODS))}.{did_you_mean(method, METHODS)}"
        )
    start = read_start(folder)
    config = METHODS[method](**{**fields, **start_fields(start, method, fields)})
    refuse_other_model(start, base, getattr(base, "name_or_path", "") or type(base).__name__)
    model = cast(PeftModel, peft.get_peft_model(cast(PreTrainedModel, base), config, adapter_name=adapter_name))
    load_start(model, start, adapter_name)
    return model
