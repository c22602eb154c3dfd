"""`export_lora`: an adapter of ours as a plain LoRA (or DoRA) folder that needs no ranktune to load.

The result is what forward adds: gates and scales are folded into B, components that only wait in reserve and modules
without components are dropped. A weight-decomposed adapter stays one (stock PEFT reads it), or becomes a LoRA of a
given rank with an error that is reported; its magnitude is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ranktune.adapter_file import TENSOR_FILE
from ranktune.adapters import layers
from ranktune.config import RankConfig
from ranktune.errors import ConfigError, ExportError, did_you_mean
from ranktune.frozen_weight import dense
from ranktune.layer import RankLayer
from ranktune.magnitude import gain_offset, norm_dtype, row_norms, weight_norms
from ranktune.peft_compat import FILE_PREFIX, PREFIX, pattern_value
from ranktune.plain_lora import (
    PlainLora,
    PlainModule,
    Profile,
    check_profile,
    exact_targets,
)
from ranktune.rank_setting import refuse_untrained_rank
from ranktune.recompression import dense_singular_form, difference_norm, product_norm, singular_form
from ranktune.run.atomic import write_folder
from ranktune.tuner import modules_outside_adapters

# Rounding scale x gate x B to the file's dtype, relative to the module's update.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """What `export_lora` wrote.

    Attributes:
        ranks: module name to the rank it has in the adapter (in a uniform file all are padded to the largest).
        dropped: modules without components, which are not in the file.
        decomposed: whether the file is a DoRA, which PEFT reads and vLLM, TGI and llama.cpp do not.
        errors: with ``svd_rank``, module name to the share of its update's Frobenius norm that was lost.
        nbytes: the size of the tensors.
    """

    ranks: dict[str, int]
    dropped: list[str]
    decomposed: bool
    errors: dict[str, float]
    nbytes: int


def export_lora(
    model: nn.Module,
    directory: str | Path,
    profile: Profile = "uniform",
    rank: int | None = None,
    adapter_name: str = "default",
    svd_rank: int | None = None,
) -> Exported:
    """Write an adapter as a plain LoRA folder: exact, and readable without ranktune.

    With ``use_dora`` the folder is a PEFT DoRA, unless ``svd_rank`` asks for a LoRA that approximates it. Modules
    trained in full (a classifier's head) travel along.

    Args:
        model: the model with the adapter on it; it is not changed.
        directory: the folder to make; it must not exist, or be empty. It appears in one step.
        profile: ``"uniform"``, one rank with zeros as filling, exact in every engine; or ``"compact"``, every module
            with its own rank, for PEFT and diffusers.
        rank: of a nested adapter (dylora), the rank to cut it at; its current one by default.
        adapter_name: which adapter.
        svd_rank: make a LoRA of at most this rank per module by truncated SVD.

    Returns:
        What was written.

    Raises:
        ConfigError: the adapter is not there, cannot be written as plain LoRA, or has nothing in it; or a value is
            wrong. Nothing was written.
        ExportError: the file that was written does not hold the adapter's update; it was removed.
    """
    check_profile(profile)
    path = Path(directory)
    refuse_occupied(path)
    config = _config_of(model, adapter_name)
    if svd_rank is not None and (isinstance(svd_rank, bool) or svd_rank < 1):
        raise ConfigError(f"svd_rank={svd_rank!r} must be a whole number, at least 1.")
    if rank is not None:
        refuse_untrained_rank(model, rank, adapter_name)
    modules, errors = {}, {}
    adapted = dict(layers(model, adapter_name))
    with torch.no_grad():
        for name, layer in adapted.items():
            module = _plain_module(layer, adapter_name, rank)
            if svd_rank is None:
                _refuse_zero_rows(name, module, layer)
            else:
                module, errors[name] = _approximated(module, layer, svd_rank)
            modules[name] = module
        kept = {name: module for name, module in modules.items() if module.rank or module.magnitude is not None}
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        outside = (name for name, _ in modules_outside_adapters(base))
        lora = PlainLora(
            modules=kept,
            target_modules=exact_targets(kept, (name for name in outside if name not in kept)),
            others=_modules_trained_in_full(model, adapter_name),
            fields=_fields(config, base, adapted),
        )

        def fill(folder: Path) -> None:
            lora.write(folder, profile)
            if svd_rank is None:
                _refuse_unfaithful(folder, {name: adapted[name] for name in kept}, adapter_name, rank)

        path.parent.mkdir(parents=True, exist_ok=True)
        write_folder(path, fill)
    return Exported(
        ranks={name: module.rank for name, module in kept.items()},
        dropped=[name for name in modules if name not in kept],
        decomposed=lora.decomposed,
        errors=errors,
        nbytes=(path / TENSOR_FILE).stat().st_size,
    )


def _plain_module(layer: RankLayer, adapter_name: str, rank: int | None) -> PlainModule:
    update = layer.update_of(adapter_name)
    A, B, scale = update.plain_factors(layer.scaling[adapter_name], rank)
    return PlainModule(A.to(norm_dtype(A.dtype)), B.to(norm_dtype(B.dtype)) * scale, update.lora_magnitude_vector)


def _approximated(module: PlainModule, layer: RankLayer, rank: int) -> tuple[PlainModule, float]:
    """The best LoRA of at most this rank, and the share of the update's norm it loses."""
    if module.magnitude is None:
        form = singular_form(module.A, module.B)
    else:
        weight = layer.frozen().weight
        delta = module.B @ module.A
        norms = row_norms(weight, weight_norms(weight), module.A, module.B, 1.0)
        form = dense_singular_form(delta + gain_offset(module.magnitude, norms).unsqueeze(1) * (dense(weight) + delta))
    return PlainModule(*form.factors(rank)), form.error(rank)


def _refuse_zero_rows(name: str, module: PlainModule, layer: RankLayer) -> None:
    """Stock PEFT divides by the norm of ``W + s B A`` row by row; ours has a floor."""
    if module.magnitude is None:
        return
    weight = layer.frozen().weight
    constants = weight_norms(weight)
    zero = int((row_norms(weight, constants, module.A, module.B, 1.0) <= constants.floor).sum())
    if zero:
        rows = "a row of its weight is" if zero == 1 else f"{zero} rows of its weight are"
        raise ConfigError(
            f"{name}: {rows} zero, where stock PEFT's DoRA divides by zero. Export with "
            "svd_rank, or merge the adapter into the model."
        )


def _refuse_unfaithful(folder: Path, adapted: Mapping[str, RankLayer], adapter_name: str, rank: int | None) -> None:
    """Compare what the files say of each module with the adapter's own factors, in float64."""
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    tensors = load_file(folder / TENSOR_FILE)
    for name, layer in adapted.items():
        update = layer.update_of(adapter_name)
        r = pattern_value(config.rank_pattern or {}, name, config.r)
        scale = pattern_value(config.alpha_pattern or {}, name, config.lora_alpha) / r
        saved_A, saved_B = (tensors[f"{FILE_PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
        A, B, own_scale = update.plain_factors(layer.scaling[adapter_name], rank)
        expected = A.cpu(), B.cpu().double() * own_scale
        difference = difference_norm((saved_A, saved_B.double() * scale), expected)
        norm = product_norm(*expected)
        magnitude = update.lora_magnitude_vector
        if magnitude is not None and not torch.equal(
            tensors[f"{FILE_PREFIX}{name}.lora_magnitude_vector"], magnitude.detach().cpu()
        ):
            raise ExportError(f"{name}: the magnitude in {TENSOR_FILE} is not the adapter's. Nothing was kept.")
        if saved_A.shape[0] != r or not difference <= _TOLERANCE * norm:
            raise ExportError(
                f"{name}: the update in {TENSOR_FILE} differs from the adapter's by {difference:.3g} of {norm:.3g}. "
                "Nothing was kept; do the adapter's tensors hold NaN or infinity?"
            )


def _config_of(model: nn.Module, adapter_name: str) -> RankConfig:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ConfigError(
            f"adapter_name={adapter_name!r} is not on this model; it has "
            f"{', '.join(map(repr, configs)) or 'no adapters'}.{did_you_mean(adapter_name, configs)}"
        )
    config = configs[adapter_name]
    if not isinstance(config, RankConfig):
        raise ConfigError(
            f"adapter {adapter_name!r} is PEFT's own ({config.peft_type.value}): model.save_pretrained writes it "
            "already, and `ranktune squeeze` another layout or size of what that writes."
        )
    return config


def _modules_trained_in_full(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What `save_pretrained` keeps beside the adapter's own tensors, by name in the file."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {
        name if name.startswith(FILE_PREFIX) else FILE_PREFIX + name: tensor
        for name, tensor in saved.items()
        if PREFIX not in name
    }


def _fields(config: RankConfig, base: nn.Module, adapted: Mapping[str, RankLayer]) -> dict[str, Any]:
    """The fields of ours that mean the same in a `LoraConfig`."""
    first = next(iter(adapted.values())).get_base_layer()
    auto_mapping = None
    if config.task_type is None:  # as PEFT's save_pretrained does
        auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return {
        "task_type": config.task_type,
        "auto_mapping": auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path or getattr(base, "name_or_path", None) or None,
        "revision": config.revision,
        "modules_to_save": config.modules_to_save,
        "fan_in_fan_out": isinstance(first, Conv1D),
    }


def refuse_occupied(path: Path) -> None:
    """Raises ConfigError for a path that is a file, or a folder with something in it."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} exists already: name a folder that does not exist, or an empty one.")
