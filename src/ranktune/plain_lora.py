"""`PlainLora`: an adapter that every engine understands, in memory, and as a folder in stock PEFT's format.

Scales and gates are inside B, so each module's update is ``B A`` and nothing else. Two layouts of a file:

- ``uniform``: one rank for all modules, the largest, with zeros filling the rest. No engine can get the scale wrong.
- ``compact``: every module has its own rank (``rank_pattern``, with an equal ``alpha_pattern``). Smaller; read by PEFT
  and diffusers, while vLLM, TGI and llama.cpp apply one scale to all modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ranktune.adapter_file import TENSOR_FILE
from ranktune.errors import ConfigError, did_you_mean
from ranktune.peft_compat import FILE_PREFIX, pattern_value

Profile = Literal["uniform", "compact"]


@dataclass(frozen=True)
class PlainModule:
    """One module's update.

    Attributes:
        A: [r, in]. B: [out, r], scale included. magnitude: m [out] of a weight-decomposed module, or None.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class PlainLora:
    """A whole adapter.

    Attributes:
        modules: module name in the base model to its update.
        target_modules: what names them, and nothing else, in PEFT's way.
        others: tensors of modules trained in full (a head), by their names in the file.
        fields: further fields of the config: task, base model, modules_to_save.
    """

    modules: Mapping[str, PlainModule]
    target_modules: list[str] | str
    others: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decomposed(self) -> bool:
        """Whether the modules have magnitudes (DoRA)."""
        return any(module.magnitude is not None for module in self.modules.values())

    def write(self, folder: Path, profile: Profile) -> None:
        """Write the two files of a PEFT adapter into a folder that exists.

        Raises:
            ConfigError: the profile is unknown, or no module has a component.
        """
        config, tensors = self._layout(profile)
        config.save_pretrained(str(folder))
        save_file(
            {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
            folder / TENSOR_FILE,
            metadata={"format": "pt"},
        )

    def _layout(self, profile: str) -> tuple[LoraConfig, dict[str, Tensor]]:
        check_profile(profile)
        if not self.modules:
            raise ConfigError(
                "every module of this adapter has rank 0, so there is nothing to export: the base model alone gives "
                "the same outputs."
            )
        # A module of rank 0 is here for its magnitude: it takes one component of zeros along.
        own = {name: max(1, module.rank) for name, module in self.modules.items()}
        if profile == "uniform":
            r = max(own.values())
            ranks, pattern = dict.fromkeys(own, r), {}
        else:
            r = Counter(own.values()).most_common(1)[0][0]
            ranks, pattern = own, exact_pattern(own, r)
        tensors = dict(self.others)
        for name, module in self.modules.items():
            tensors[f"{FILE_PREFIX}{name}.lora_A.weight"] = _padded(module.A, 0, ranks[name])
            tensors[f"{FILE_PREFIX}{name}.lora_B.weight"] = _padded(module.B, 1, ranks[name])
            if module.magnitude is not None:
                tensors[f"{FILE_PREFIX}{name}.lora_magnitude_vector"] = module.magnitude
        config = LoraConfig(
            r=r,
            lora_alpha=r,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            target_modules=self.target_modules,
            use_dora=self.decomposed,
            inference_mode=True,
            **self.fields,
        )
        return config, tensors


def check_profile(profile: str) -> None:
    """Raises ConfigError for a profile that does not exist."""
    if profile not in get_args(Profile):
        raise ConfigError(
            f"profile={profile!r} must be 'uniform' or 'compact'.{did_you_mean(str(profile), get_args(Profile))}"
        )


def exact_pattern(values: Mapping[str, int], default: int) -> dict[str, int]:
    """A ``rank_pattern`` that gives every module its value and no other module's.

    PEFT reads a key as a regular expression for the end of a name, and takes the first that matches: where one module's
    name ends another's, keys are anchored.
    """
    special = {name: value for name, value in values.items() if value != default}
    if all(pattern_value(special, name, default) == value for name, value in values.items()):
        return special
    return {f"^{re.escape(name)}": value for name, value in special.items()}


def exact_targets(adapted: Collection[str], others: Iterable[str]) -> list[str] | str:
    """What to put in ``target_modules``: the shortest form that matches these modules and no other.

    Args:
        adapted: names of the modules meant. others: names of all other modules of the model.
    """
    names = {part for other in others for part in _ends(other)}
    for candidates in ({name.rpartition(".")[2] for name in adapted}, set(adapted)):
        if not candidates & names:
            return sorted(candidates)
    return "|".join(re.escape(name) for name in sorted(adapted))


def _ends(name: str) -> Iterable[str]:
    """``a.b.c``, ``b.c`` and ``c``: the entries of a list of target modules that would match the module."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with zeros after its end along a dimension."""
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor
