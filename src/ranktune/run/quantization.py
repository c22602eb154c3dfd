"""`quantization:` of a recipe: the base model's weights in few bits, frozen, under an adapter in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ranktune.baselines import Baseline, Full
from ranktune.config import RankConfig
from ranktune.errors import RecipeError
from ranktune.report.tables import size

if TYPE_CHECKING:
    from ranktune.recipe.schema import Quantization

# The library of each kind, and the bits that a weight takes, its share of the scales included.
_LIBRARIES: dict[Quantization, str] = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
_BITS: dict[Quantization, float] = {"nf4": 4.13, "int8": 8.0, "torchao-int8": 8.0}
# Numbers of a 4-bit weight that share a scale. Layers whose input is no multiple of it stay as they are: bitsandbytes'
# CPU kernels would compute with wrong scales, and a run is to train on the same base wherever it is.
_RUN = 64


def check_quantization(kind: Quantization, config: RankConfig | Baseline) -> None:
    """Refuse what cannot be loaded or trained.

    Raises:
        RecipeError: the library is not installed, or the method trains the weights themselves.
    """
    library = _LIBRARIES[kind]
    if find_spec(library) is None:
        raise RecipeError(
            f"quantization: '{kind}' needs {library}, which is not installed. Run: pip install 'ranktune[quantized]'"
        )
    if isinstance(config, Full):
        raise RecipeError(
            f"quantization: '{kind}' is for weights that stay frozen, and method 'full' trains them: leave "
            "quantization out, or take another method."
        )


def unquantised(kind: Quantization, skeleton: PreTrainedModel, trained_in_full: Iterable[str]) -> dict[str, str]:
    """What stays as it is, and why: the output layer and whatever is tied to it, what is trained in full, odd widths.

    Args:
        skeleton: the model, with or without storage. trained_in_full: names of modules, or their ends.

    Returns:
        Names of modules, or their ends, each with its reason in words.
    """
    kept = dict.fromkeys(get_keys_to_not_convert(skeleton), "the output layer, or tied to it")
    kept |= dict.fromkeys(trained_in_full, "trained in full")
    if kind == "nf4":
        odd = {name: shape[1] for name, shape in _linear(skeleton, kind) if shape[1] % _RUN}
        kept |= {name: f"{width} inputs, no multiple of {_RUN}" for name, width in odd.items()}
    return dict(sorted(kept.items()))


def quantization_config(kind: Quantization, kept: Iterable[str], compute: torch.dtype) -> Any:
    """What `from_pretrained` is told.

    Args:
        kept: the names of what stays as it is. compute: the dtype that 4-bit layers multiply in.
    """
    kept = list(kept)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=kept,
    )


def in_words(kind: Quantization, skeleton: PreTrainedModel, kept: Mapping[str, str], dtype: torch.dtype) -> str:
    """How many layers are quantised and what that saves, which are not and why, for people.

    Args:
        kept: from `unquantised`. dtype: what the weights would be in otherwise.

    Raises:
        RecipeError: none would be.
    """
    shapes = dict(_linear(skeleton, kind))
    chosen = {name: shape for name, shape in shapes.items() if should_convert_module(name, list(kept))}
    if not chosen:
        raise RecipeError(
            f"quantization: '{kind}' finds nothing to quantise in this model"
            + (f": of its layers, none has an input width that is a multiple of {_RUN}." if kind == "nf4" else ".")
        )
    numbers = sum(rows * columns for rows, columns in chosen.values())
    before, after = (size(int(numbers * bits / 8)) for bits in (dtype.itemsize * 8, _BITS[kind]))
    words = (
        f"{len(chosen)} of {len(shapes)} linear layers of the base model in {kind} ({_LIBRARIES[kind]}): about {after} "
        f"instead of {before}"
    )
    reasons: dict[str, list[str]] = {}
    for name in shapes:
        if name not in chosen:
            why = next(reason for key, reason in kept.items() if not should_convert_module(name, [key]))
            reasons.setdefault(why, []).append(name)
    as_they_are = [f"{_some(names)} ({why})" for why, names in reasons.items()]
    return words + (f"; as they are: {'; '.join(as_they_are)}" if as_they_are else "")


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _linear(model: nn.Module, kind: Quantization) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes [out, in] of the layers that the library can quantise."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.append((name, (module.out_features, module.in_features)))
        elif isinstance(module, Conv1D) and kind != "torchao-int8":
            found.append((name, (module.weight.shape[1], module.weight.shape[0])))
    return found
