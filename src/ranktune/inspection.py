"""`inspect`: what is inside a saved adapter of the LoRA family. It needs no base model and runs nothing of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranktune.adapter_file import adapter_folder, read_adapter
from ranktune.errors import AdapterFileError
from ranktune.nested import NestedUpdate
from ranktune.recompression import singular_form
from ranktune.routed import RoutedUpdate
from ranktune.saved_adapter import SavedModule, load_saved_adapter
from ranktune.update import LowRankUpdate


@dataclass(frozen=True)
class Expert:
    """One expert of a mixture: the norm of its update alone, and the spread of its scalings.

    Attributes:
        norm: ``||s diag(expert_B) B diag(expert_A) A||_F``.
        rank_scaling, out_scaling: the smallest and the largest scaling on each side.
        router_norm: of its row of the router, or None without a router.
    """

    norm: float
    rank_scaling: tuple[float, float]
    out_scaling: tuple[float, float]
    router_norm: float | None


@dataclass(frozen=True)
class ModuleInspection:
    """One module of an adapter.

    Attributes:
        shape: (out, in). rank: components in use. capacity: components in the file. nbytes: in the file.
        norm: ``||s B A||_F``, gates included; None where the update depends on its input.
        components: ``|s c_i| ||b_i|| ||a_i||`` of each, as they are stored.
        singular_values: of the update, falling. Their squares are its energy.
        magnitude: smallest, mean and largest of a weight-decomposed module, or None.
        nested: of a nested adapter (dylora), the norm of the update at each rank from 1.
        experts: of a mixture (mor).
    """

    shape: tuple[int, int]
    rank: int
    capacity: int
    nbytes: int
    norm: float | None
    components: list[float]
    singular_values: list[float]
    magnitude: tuple[float, float, float] | None
    nested: list[float] | None
    experts: list[Expert] | None

    def rank_for(self, share: float) -> int:
        """The smallest rank that holds this share of the energy."""
        squares = torch.tensor(self.singular_values, dtype=torch.float64).square()
        if not float(squares.sum()):
            return 0
        reached = squares.cumsum(0) >= share * squares.sum() * (1 - 1e-12)
        return int(reached.to(torch.int8).argmax()) + 1


@dataclass(frozen=True)
class Inspection:
    """A saved adapter.

    Attributes:
        path: its folder. method: ours, or ``lora``, ``dora``, ``adalora`` of stock PEFT. peft_type: in its config.
        base_model, task_type: from its config. r, lora_alpha: likewise.
        nbytes: of all tensors. parameters: numbers in them; adapter_parameters: those that the modules have in use,
            which a run's summary counts as active. The others are a head, and the record of ranks that ours have.
        modules: by name. trained_in_full: tensors beside the adapter (a head) and their shapes.
        history: every rank change of the run, where its ``ranks.json`` lies beside the folder.
    """

    path: str
    method: str
    peft_type: str
    base_model: str | None
    task_type: str | None
    r: int | None
    lora_alpha: float | None
    nbytes: int
    parameters: int
    adapter_parameters: int
    modules: dict[str, ModuleInspection]
    trained_in_full: dict[str, tuple[int, ...]]
    history: list[dict[str, Any]]

    @property
    def ranks(self) -> dict[str, int]:
        """Module name to rank."""
        return {name: module.rank for name, module in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)


def inspect(directory: str | Path) -> Inspection:
    """Look into a saved adapter: ours of any method, or stock PEFT's LoRA, DoRA or AdaLoRA.

    Args:
        directory: an adapter folder, or a run's output directory.

    Raises:
        AdapterFileError: something is missing, torn, contradictory, or not of the LoRA family.
    """
    path = adapter_folder(directory)
    adapter = load_saved_adapter(read_adapter(path))
    config = adapter.file.config
    with torch.no_grad():
        names = _in_model_order(adapter.modules, path.parent / "ranks.json")
        modules = {name: _module(adapter.modules[name]) for name in names}
    return Inspection(
        path=str(path),
        method=adapter.method,
        peft_type=config["peft_type"],
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        r=config.get("r"),
        lora_alpha=config.get("lora_alpha"),
        nbytes=adapter.file.nbytes,
        parameters=sum(tensor.count for tensor in adapter.file.tensors.values()),
        adapter_parameters=sum(saved.parameters for saved in adapter.modules.values()),
        modules=modules,
        trained_in_full={name: tuple(tensor.shape) for name, tensor in adapter.others.items()},
        history=_history(path.parent / "ranks.json"),
    )


def _in_model_order(names: Iterable[str], ranks: Path) -> list[str]:
    """As the run's ``ranks.json`` lists them; without one, as they are given."""
    order = {name: place for place, name in enumerate(_ranks(ranks).get("final", ()))}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _module(saved: SavedModule) -> ModuleInspection:
    experts = nested = norm = None
    components, values = [], []
    if isinstance(saved.update, RoutedUpdate):
        experts = _experts(saved.update, saved.scale)
    if isinstance(saved.update, NestedUpdate):
        nested = _nested(saved.update, saved.scale)
    if saved.update is None or saved.update.mergeable:
        plain = saved.plain()
        form = singular_form(plain.A.double(), plain.B.double())
        components = (plain.A.double().norm(dim=1) * plain.B.double().norm(dim=0)).tolist()
        values = form.values.tolist()
        norm = float(form.values.norm())
    m = saved.tensors.get("lora_magnitude_vector")
    return ModuleInspection(
        shape=saved.shape,
        rank=saved.rank,
        capacity=saved.capacity,
        nbytes=saved.nbytes,
        norm=norm,
        components=components,
        singular_values=values,
        magnitude=None if m is None else (float(m.min()), float(m.float().mean()), float(m.max())),
        nested=nested,
        experts=experts,
    )


def _nested(update: NestedUpdate, scale: float) -> list[float]:
    """The norm of the update at every rank, with the scale of that rank."""
    return [_norm(update, scale, b) for b in range(1, update.capacity + 1)]


def _norm(update: LowRankUpdate, scale: float, rank: int) -> float:
    A, B, scale = update.plain_factors(scale, rank)
    return scale * _product_norm(A.double(), B.double())


def _experts(update: RoutedUpdate, scale: float) -> list[Expert]:
    A, B = update.lora_A.double(), update.lora_B.double()
    experts = []
    for number, (rank_side, out_side) in enumerate(zip(update.expert_A, update.expert_B, strict=True)):
        scaled = B * out_side.double().unsqueeze(1) * rank_side.double()
        row = None if update.router is None else float(update.router[number].norm())
        experts.append(Expert(scale * _product_norm(A, scaled), _range(rank_side), _range(out_side), row))
    return experts


def _product_norm(A: Tensor, B: Tensor) -> float:
    """``||B A||_F`` from r x r Gram matrices."""
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt())


def _range(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _history(path: Path) -> list[dict[str, Any]]:
    """The rank changes of a run, where it left them."""
    try:
        changes = _ranks(path).get("history", [])
        return [{key: change[key] for key in ("step", "module", "old", "new")} for change in changes]
    except (KeyError, TypeError) as error:
        raise AdapterFileError(f"{path} is not what ranktune writes: {error!r}.") from error


def _ranks(path: Path) -> dict[str, Any]:
    """The ``ranks.json`` of a run, or nothing."""
    if not path.is_file():
        return {}
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not what ranktune writes: {error!r}.") from error
    if not isinstance(ranks, dict) or not isinstance(ranks.get("final"), dict) or "history" not in ranks:
        raise AdapterFileError(f"{path} is not what ranktune writes: it needs 'final' and 'history'.")
    return ranks
