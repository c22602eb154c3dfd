"""What a saved adapter of the LoRA family says of each module: factors, scale, magnitude. No base model is needed.

Three formats: ours (``RANKTUNE``, any method), stock PEFT's ``LORA`` (with DoRA and rsLoRA) and ``ADALORA``. Names and
shapes are checked as a whole before any tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ranktune.adapter_file import CONFIG_FILE, AdapterFile, StoredTensor
from ranktune.config import PEFT_TYPE
from ranktune.errors import AdapterFileError
from ranktune.module_order import in_usual_order
from ranktune.our_format import OurFormat
from ranktune.peft_compat import FILE_PREFIX, PREFIX
from ranktune.plain_lora import PlainModule
from ranktune.stock_format import StockAdaLora, StockLora
from ranktune.update import LowRankUpdate

_FORMATS = {PEFT_TYPE: OurFormat, "LORA": StockLora, "ADALORA": StockAdaLora}
# Options of stock LoRA that add something other than s B A (and a magnitude).
_OTHER_LORAS = (
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# Starts of stock LoRA after which the base model's weights are not those of its file, whenever the adapter is loaded.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class SavedModule:
    """One module of a saved adapter.

    Attributes:
        shape: (out, in). capacity: components in the file. rank: components in use, without zeros at their end.
        tensors: the module's tensors by their own names. nbytes: their size in the file.
        scale: the factor on ``B A``, gates apart.
        update: of ours, the update itself with its tensors loaded; None in stock formats.
    """

    shape: tuple[int, int]
    capacity: int
    rank: int
    tensors: dict[str, Tensor]
    nbytes: int
    scale: float
    update: LowRankUpdate | None = None

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B [out, r] with all gates inside, and the scale; at least float32.

        Raises:
            ConfigError: the update depends on its input.
        """
        if self.update is not None:
            A, B, scale = self.update.plain_factors(self.scale)
        else:
            A, B, scale = self.tensors["lora_A"], self.tensors["lora_B"], self.scale
            if "lora_E" in self.tensors:
                B = B * self.tensors["lora_E"].T
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (A, B))
        return A, B, scale

    @property
    def magnitude(self) -> Tensor | None:
        """m [out] of a weight-decomposed module."""
        return self.tensors.get("lora_magnitude_vector")

    @property
    def parameters(self) -> int:
        """Numbers in use, gates and magnitude among them: what a run's summary counts as active."""
        if self.update is not None:
            return self.update.parameters_at(self.rank)
        filled_up = (self.capacity - self.rank) * sum(self.shape) if "lora_E" not in self.tensors else 0
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name != "ranknum") - filled_up

    @torch.no_grad()
    def plain(self) -> PlainModule:
        """As ``B A``, with the scale and all gates inside B; at least float32.

        Raises:
            ConfigError: the update depends on its input.
        """
        A, B, scale = self.factors()
        return PlainModule(A, B * scale, self.magnitude)


@dataclass(frozen=True)
class SavedAdapter:
    """A whole saved adapter.

    Attributes:
        file: the folder. method: the name of ours, or ``lora``, ``dora``, ``adalora`` of stock PEFT.
        modules: by module name in the base model, in the usual order.
        others: tensors of modules trained in full, by name in the file.
    """

    file: AdapterFile
    method: str
    modules: dict[str, SavedModule]
    others: dict[str, Tensor]

    def require_unchanged_base(self) -> None:
        """Refuse what is no update of the base model as its own files have it, so that ``s B A`` is not all of it.

        Raises:
            AdapterFileError: PEFT changes the base's weights when it loads this adapter, or biases were trained.
        """
        start, bias = self.file.config.get("init_lora_weights"), self.file.config.get("bias") or "none"
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise AdapterFileError(
                f"{self.file.path / CONFIG_FILE} has init_lora_weights={start!r}: PEFT changes the base model's "
                "weights when it loads this adapter, and without that its factors mean nothing. Save it in PEFT with "
                "path_initial_model_for_weight_conversion first."
            )
        if bias != "none":
            raise AdapterFileError(
                f"{self.file.path / CONFIG_FILE} has bias={bias!r}: biases of the base model were trained beside the "
                "factors, and only the factors are understood here."
            )


def load_saved_adapter(file: AdapterFile) -> SavedAdapter:
    """Read every tensor of a checked folder, and understand it.

    Raises:
        AdapterFileError: it is no adapter of the LoRA family, or its tensors do not make one.
    """
    kind = file.config["peft_type"]
    if kind not in _FORMATS:
        raise AdapterFileError(
            f"{file.path / CONFIG_FILE} has peft_type={kind!r}: only adapters of the LoRA family "
            f"({', '.join(_FORMATS)}) have ranks."
        )
    for option in _OTHER_LORAS:
        if file.config.get(option):
            raise AdapterFileError(f"{file.path / CONFIG_FILE} has {option} set: such a LoRA is not only s B A.")
    grouped, others = _grouped(file, _FORMATS[kind].place)
    if not grouped:
        raise AdapterFileError(f"{file.tensor_file} has no tensors of a {kind} adapter.")
    form = _FORMATS[kind](file, grouped)
    for name, stored in grouped.items():
        form.check(name, {part: tensor.shape for part, (_, tensor) in stored.items()})
    tensors = file.load()
    modules = {}
    for name in in_usual_order(grouped):
        own = {part: tensors[stored_name] for part, (stored_name, _) in grouped[name].items()}
        if not all(torch.isfinite(tensor).all() for tensor in own.values()):
            raise AdapterFileError(f"{file.tensor_file}: module {name} holds NaN or infinity.")
        A, B, found = own["lora_A"], own["lora_B"], form.read(name, own)
        nbytes = sum(tensor.nbytes for _, tensor in grouped[name].values())
        shape = (B.shape[0], A.shape[1])
        modules[name] = SavedModule(shape, A.shape[0], found.rank, own, nbytes, found.scale, found.update)
    return SavedAdapter(file, form.method, modules, {name: tensors[name] for name in others})


Grouped = Mapping[str, dict[str, tuple[str, StoredTensor]]]


def _grouped(file: AdapterFile, place: re.Pattern[str]) -> tuple[Grouped, list[str]]:
    """Tensors by module and by their own name, and the names of the rest."""
    grouped: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
    others = []
    for name, tensor in file.tensors.items():
        found = place.fullmatch(name)
        if found is None:
            if any(part.startswith(("lora_", PREFIX)) for part in name.split(".")):
                raise AdapterFileError(
                    f"{file.tensor_file} holds {name}, which is no linear layer's: embeddings are not supported here."
                )
            others.append(name)
            continue
        module = grouped.setdefault(found["module"].removeprefix(FILE_PREFIX), {})
        if found["tensor"].startswith("lora_") and tensor.dtype not in _FACTOR_DTYPES:
            raise AdapterFileError(f"{file.tensor_file} holds {name} of type {tensor.dtype}, which no factor has.")
        if found["tensor"] in module:
            raise AdapterFileError(f"{file.tensor_file} holds {found['tensor']} of {found['module']} twice.")
        module[found["tensor"]] = (name, tensor)
    return grouped, others
