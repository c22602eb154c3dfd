"""What a saved adapter of the LoRA family says of each module: factors, scale, magnitude. No base model is needed.

Three formats: ours (``RANKTUNE``, any method), stock PEFT's ``LORA`` (with DoRA and rsLoRA) and ``ADALORA``. Names and
shapes are checked as a whole before any tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ranktune.methods  # noqa: F401  (registers every method)
from ranktune.adapter_file import CONFIG_FILE, AdapterFile, StoredTensor
from ranktune.config import PEFT_TYPE, RankConfig, config_from_fields
from ranktune.errors import AdapterFileError, ConfigError
from ranktune.growing import GrowingUpdate
from ranktune.module_order import in_usual_order
from ranktune.nested import NestedUpdate
from ranktune.peft_compat import FILE_PREFIX, PREFIX, pattern_value
from ranktune.plain_lora import PlainModule
from ranktune.update import LowRankUpdate

# Where each format keeps a module's tensors: its name, and what follows it.
_PLACES = {
    PEFT_TYPE: re.compile(rf"(?P<module>.+)\.{PREFIX}update\.(?P<tensor>\w+)"),
    "LORA": re.compile(r"(?P<module>.+)\.(?P<tensor>lora_(?:A|B|magnitude_vector))(?:\.weight)?"),
    "ADALORA": re.compile(r"(?P<module>.+)\.(?P<tensor>lora_A|lora_B|lora_E|ranknum)"),
}
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
# A pattern's regular expression could be made to take for ever: characters of the longest name, to the power of its
# repetitions, times the modules it is matched against.
_MOST_STEPS = 10**8
_FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")
# Numbers that a module of ours may have room for, beside those in the file.
_MOST_ROOM = 1 << 28


@dataclass(frozen=True)
class SavedModule:
    """One module of a saved adapter.

    Attributes:
        shape: (out, in). capacity: components in the file. rank: components in use.
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
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name != "ranknum")

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
    if kind not in _PLACES:
        raise AdapterFileError(
            f"{file.path / CONFIG_FILE} has peft_type={kind!r}: only adapters of the LoRA family "
            f"({', '.join(_PLACES)}) have ranks."
        )
    for option in _OTHER_LORAS:
        if file.config.get(option):
            raise AdapterFileError(f"{file.path / CONFIG_FILE} has {option} set: such a LoRA is not only s B A.")
    grouped, others = _grouped(file, _PLACES[kind])
    if not grouped:
        raise AdapterFileError(f"{file.tensor_file} has no tensors of a {kind} adapter.")
    config = _our_config(file) if kind == PEFT_TYPE else None
    updates: dict[str, LowRankUpdate] = {}
    for name, stored in grouped.items():
        if config is None:
            _refuse_misfit(file, name, stored)
        else:
            updates[name] = _checked_update(file, config, name, stored)
    tensors = file.load()
    modules = {}
    for name in in_usual_order(grouped):
        stored = grouped[name]
        own = {part: tensors[stored_name] for part, (stored_name, _) in stored.items()}
        nbytes = sum(tensor.nbytes for _, tensor in stored.values())
        out_in = (own["lora_B"].shape[0], own["lora_A"].shape[1])
        capacity = own["lora_A"].shape[0]
        if not all(torch.isfinite(tensor).all() for tensor in own.values()):
            raise AdapterFileError(f"{file.tensor_file}: module {name} holds NaN or infinity.")
        if config is not None:
            update = updates[name]
            update.load_state_dict(own)
            alpha = _pattern_value(file, "alpha_pattern", name, config.lora_alpha, grouped)
            scale = config.scaling(alpha, _pattern_value(file, "rank_pattern", name, config.capacity, grouped))
            if isinstance(update, (GrowingUpdate, NestedUpdate)) and update.rank < 1:
                raise AdapterFileError(f"{file.tensor_file}: module {name} has no component in use.")
            modules[name] = SavedModule(out_in, capacity, update.rank, own, nbytes, scale, update)
        else:
            scale = _stock_scale(file, name, own, grouped)
            rank = int(own["lora_E"].count_nonzero()) if "lora_E" in own else capacity
            modules[name] = SavedModule(out_in, capacity, rank, own, nbytes, scale)
    method = config.method if config is not None else _stock_method(file)
    return SavedAdapter(file, method, modules, {name: tensors[name] for name in others})


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


def _refuse_misfit(file: AdapterFile, name: str, stored: dict[str, tuple[str, StoredTensor]]) -> None:
    """Of stock formats: A [r, in], B [out, r], m [out], E [r, 1]."""
    shapes = {part: tensor.shape for part, (_, tensor) in stored.items()}
    A, B = shapes.get("lora_A"), shapes.get("lora_B")
    if A is None or B is None:
        raise AdapterFileError(f"{file.tensor_file}: module {name} lacks {'lora_A' if A is None else 'lora_B'}.")
    if file.config.get("use_dora") and "lora_magnitude_vector" not in shapes:
        raise AdapterFileError(f"{file.tensor_file}: module {name} lacks lora_magnitude_vector.")
    if len(A) != 2 or len(B) != 2:
        raise AdapterFileError(
            f"{file.tensor_file}: module {name} has factors of shape {list(A)} and {list(B)}; only linear layers, with "
            "two dimensions, are supported here."
        )
    fitting = {"lora_magnitude_vector": (B[0],), "lora_E": (A[0], 1), "ranknum": ()}
    for part, shape in fitting.items():
        if part in shapes and shapes[part] != shape:
            raise AdapterFileError(
                f"{file.tensor_file}: module {name} has {part} of shape {list(shapes[part])} where {list(shape)} "
                "belongs."
            )
    if A[0] != B[1]:
        raise AdapterFileError(
            f"{file.tensor_file}: module {name} has {A[0]} rows in lora_A and {B[1]} columns in lora_B."
        )
    if file.config["peft_type"] == "ADALORA":
        if "lora_E" not in shapes:
            raise AdapterFileError(f"{file.tensor_file}: module {name} lacks lora_E.")
        kept = _allocated(file, name)
        if kept is not None and sum(kept) != A[0]:
            raise AdapterFileError(
                f"{file.path / CONFIG_FILE} says that {sum(kept)} components of {name} were kept, and "
                f"{file.tensor_file.name} has {A[0]}."
            )


def _our_config(file: AdapterFile) -> RankConfig:
    fields = {key: value for key, value in file.config.items() if key != "peft_type"}
    try:
        return config_from_fields(fields)
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file.path / CONFIG_FILE}: {error}") from error


def _checked_update(
    file: AdapterFile, config: RankConfig, name: str, stored: dict[str, tuple[str, StoredTensor]]
) -> LowRankUpdate:
    """The method's own update for the shapes in the file, without values."""
    shapes = {part: tensor.shape for part, (_, tensor) in stored.items()}
    A, B = shapes.get("lora_A", ()), shapes.get("lora_B", ())
    if len(A) != 2 or len(B) != 2:
        raise AdapterFileError(f"{file.tensor_file}: module {name} lacks lora_A [r, in] or lora_B [out, r].")
    capacity = _pattern_value(file, "rank_pattern", name, config.capacity, ())
    if capacity * (A[1] + B[0]) > _MOST_ROOM:
        raise AdapterFileError(f"{file.path / CONFIG_FILE}: room for {capacity:,} components in {name} is too much.")
    try:
        # First without storage: what the configuration asks for may be anything, until it fits what is in the file.
        with torch.device("meta"):
            misfit = _make_update(config, A[1], B[0], capacity, shapes).misfit(shapes)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterFileError(f"{file.path / CONFIG_FILE}: no module can be made from it: {reason}") from error
    if misfit is not None:
        raise AdapterFileError(f"{file.tensor_file}: module {name} {misfit}.")
    return _make_update(config, A[1], B[0], capacity, shapes)


def _make_update(
    config: RankConfig, in_features: int, out_features: int, capacity: int, tensors: Collection[str]
) -> LowRankUpdate:
    update = config.make_update(in_features, out_features, capacity)
    config.as_saved(update, tensors)
    if config.use_dora:
        update.lora_magnitude_vector = torch.nn.Parameter(torch.empty(out_features))
    return update


def _stock_method(file: AdapterFile) -> str:
    if file.config["peft_type"] == "ADALORA":
        return "adalora"
    return "dora" if file.config.get("use_dora") else "lora"


def _stock_scale(file: AdapterFile, name: str, tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """s of a module in PEFT's own formats."""
    r, alpha = file.config.get("r"), file.config.get("lora_alpha")
    if file.config["peft_type"] == "ADALORA":
        alpha = alpha or float(file.config.get("init_r") or 1)
        # PEFT goes on dividing by the rank that a module started with, whatever its allocator has left of it.
        started = len(_allocated(file, name) or ()) or tensors["lora_A"].shape[0]
        return alpha / (float(tensors.get("ranknum", started)) + 1e-5)
    if r is None or alpha is None:
        raise AdapterFileError(f"{file.path / CONFIG_FILE} does not say {'r' if r is None else 'lora_alpha'}.")
    r = _pattern_value(file, "rank_pattern", name, r, names)
    alpha = _pattern_value(file, "alpha_pattern", name, alpha, names)
    if r != tensors["lora_A"].shape[0]:
        raise AdapterFileError(
            f"{file.path / CONFIG_FILE} gives module {name} rank {r}, and {file.tensor_file.name} has "
            f"{tensors['lora_A'].shape[0]} components."
        )
    return alpha / (r**0.5 if file.config.get("use_rslora") else r)


def _allocated(file: AdapterFile, name: str) -> list[bool] | None:
    """Which of a module's first components AdaLoRA's allocator kept, where it acted."""
    kept = (file.config.get("rank_pattern") or {}).get(f"{name}.lora_E")
    return kept if isinstance(kept, list) else None


def _pattern_value(file: AdapterFile, pattern: str, name: str, default: Any, names: Iterable[str]) -> Any:
    """PEFT's rule for ``rank_pattern`` and ``alpha_pattern``, unless a key would take for ever to match."""
    values = file.config.get(pattern) or {}
    longest, count = max(map(len, [name, *names])), len(list(names)) or 1
    for key in values:
        repetitions = len(re.findall(r"[*+{]", key))
        if len(key) > 4 * longest + 64 or (repetitions and longest ** (repetitions + 1) * count > _MOST_STEPS):
            raise AdapterFileError(f"{file.path / CONFIG_FILE}: {pattern} has a key too costly to match: {key[:80]!r}.")
    try:
        return pattern_value(values, name, default)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterFileError(f"{file.path / CONFIG_FILE}: a key of {pattern} is no pattern: {error}.") from error
