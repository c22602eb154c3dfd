"""Stock PEFT's formats of a saved adapter: LoRA, with DoRA and rsLoRA, and AdaLoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ranktune.adapter_file import CONFIG_FILE
from ranktune.adapter_format import AdapterFormat, Reading, Shapes
from ranktune.errors import AdapterFileError


class StockLora(AdapterFormat):
    """``LORA``: A [r, in], B [out, r], and m [out] of a weight-decomposed one."""

    place = re.compile(r"(?P<module>.+)\.(?P<tensor>lora_(?:A|B|magnitude_vector))(?:\.weight)?")

    @property
    def method(self) -> str:
        return "dora" if self.file.config.get("use_dora") else "lora"

    def check(self, name: str, shapes: Shapes) -> None:
        """See `AdapterFormat.check`."""
        A, B = shapes.get("lora_A"), shapes.get("lora_B")
        module = f"{self.file.tensor_file}: module {name}"
        if A is None or B is None:
            raise AdapterFileError(f"{module} lacks {'lora_A' if A is None else 'lora_B'}.")
        if self.file.config.get("use_dora") and "lora_magnitude_vector" not in shapes:
            raise AdapterFileError(f"{module} lacks lora_magnitude_vector.")
        if len(A) != 2 or len(B) != 2:
            raise AdapterFileError(
                f"{module} has factors of shape {list(A)} and {list(B)}; only linear layers, with two dimensions, are "
                "supported here."
            )
        fitting = {"lora_magnitude_vector": (B[0],), "lora_E": (A[0], 1), "ranknum": ()}
        for part, shape in fitting.items():
            if part in shapes and shapes[part] != shape:
                raise AdapterFileError(
                    f"{module} has {part} of shape {list(shapes[part])} where {list(shape)} belongs."
                )
        if A[0] != B[1]:
            raise AdapterFileError(f"{module} has {A[0]} rows in lora_A and {B[1]} columns in lora_B.")

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> Reading:
        """Rank and scale, which the configuration has to say."""
        config, capacity = self.file.config, tensors["lora_A"].shape[0]
        r, alpha = config.get("r"), config.get("lora_alpha")
        if r is None or alpha is None:
            raise AdapterFileError(f"{self.file.path / CONFIG_FILE} does not say {'r' if r is None else 'lora_alpha'}.")
        r = self.pattern_value("rank_pattern", name, r)
        alpha = self.pattern_value("alpha_pattern", name, alpha)
        if r != capacity:
            raise AdapterFileError(
                f"{self.file.path / CONFIG_FILE} gives module {name} rank {r}, and {self.file.tensor_file.name} has "
                f"{capacity} components."
            )
        used = _used(tensors["lora_A"], tensors["lora_B"])
        return Reading(used, alpha / (r**0.5 if config.get("use_rslora") else r))


def _used(A: Tensor, B: Tensor) -> int:
    """How many components come before those of zeros with which the uniform profile fills up."""
    used = ((A != 0).any(1) | (B != 0).any(0)).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


class StockAdaLora(StockLora):
    """``ADALORA``: E [r, 1] between the factors, zero where a component was pruned, and how many were left."""

    place = re.compile(r"(?P<module>.+)\.(?P<tensor>lora_A|lora_B|lora_E|ranknum)")

    @property
    def method(self) -> str:
        return "adalora"

    def check(self, name: str, shapes: Shapes) -> None:
        """See `AdapterFormat.check`."""
        super().check(name, shapes)
        if "lora_E" not in shapes:
            raise AdapterFileError(f"{self.file.tensor_file}: module {name} lacks lora_E.")
        kept, capacity = self._allocated(name), shapes["lora_A"][0]
        if kept is not None and sum(kept) != capacity:
            raise AdapterFileError(
                f"{self.file.path / CONFIG_FILE} says that {sum(kept)} components of {name} were kept, and "
                f"{self.file.tensor_file.name} has {capacity}."
            )

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> Reading:
        """PEFT goes on dividing by the rank that a module started with, whatever its allocator has left of it."""
        config = self.file.config
        alpha = config.get("lora_alpha") or float(config.get("init_r") or 1)
        started = len(self._allocated(name) or ()) or tensors["lora_A"].shape[0]
        scale = alpha / (float(tensors.get("ranknum", started)) + 1e-5)
        return Reading(int(tensors["lora_E"].count_nonzero()), scale)

    def _allocated(self, name: str) -> list[bool] | None:
        """Which of a module's first components the allocator kept, where it acted."""
        kept = (self.file.config.get("rank_pattern") or {}).get(f"{name}.lora_E")
        return kept if isinstance(kept, list) else None
