"""Row norms kept while nothing they depend on has changed: in evaluation, accumulation, checkpoint recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ranktune.frozen_weight import FrozenRows, Weight
from ranktune.lowrank import Components
from ranktune.magnitude import WeightNorms, row_norms, weight_norms


class _OptimizerClock:
    """Counts optimizer steps in this process, of any optimizer.

    Fused optimizers write parameters without raising their version counters, so a version alone cannot tell whether
    a norm is stale.
    """

    def __init__(self) -> None:
        self.steps = 0
        register_optimizer_step_post_hook(self._tick)

    def _tick(self, *_: Any) -> None:
        self.steps += 1


_CLOCK = _OptimizerClock()


@dataclass(frozen=True)
class _Cached:
    """Norms, what they were computed from, and copies of the factors where comparing them by value is cheap."""

    norms: Tensor
    marks: tuple[object, ...]
    copies: tuple[Tensor, ...]

    def holds_for(self, marks: tuple[object, ...], sources: Sequence[Tensor]) -> bool:
        return self.marks == marks and all(map(torch.equal, self.copies, sources))


class NormCache:
    """The row norms of one update, valid while weight, A, B, scale and the number of components are what they were.

    A mark is the tensor's storage, its version and the optimizer clock; the storage is held by a weak reference, so
    that its address cannot come back as another tensor's. Writes through ``.data`` outside an optimizer leave all three
    alone: on the CPU, where reading a tensor costs no synchronisation, the factors are compared by value as well.

    Copies and pickles are empty: a cache belongs to the tensors it was computed from.
    """

    def __init__(self) -> None:
        self._weight_mark: object = None
        self._constants: WeightNorms | None = None
        self._cached: _Cached | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return (NormCache, ())

    def constants(self, weight: Weight) -> WeightNorms:
        """The weight's own norms, recomputed when it has changed."""
        stored, rows = (weight.stored, weight) if isinstance(weight, FrozenRows) else (weight, weight.detach())
        if not _cacheable(stored):
            return weight_norms(rows)
        mark = _mark(stored, follows_optimizer=stored.requires_grad)
        if self._constants is None or self._weight_mark != mark:
            self._constants, self._weight_mark = weight_norms(rows), mark
        return self._constants

    @torch.no_grad()
    def norms(self, weight: Weight, added: Components, sources: Sequence[Tensor]) -> Tensor:
        """``||W_j + s (B diag(gate) A)_j||`` [out], without history; ``sources`` are the tensors it is made from."""
        constants = self.constants(weight)
        if not _cacheable(weight.stored if isinstance(weight, FrozenRows) else weight, *sources):
            return row_norms(weight, constants, *added.plain(), added.scale, guard=not torch.compiler.is_compiling())
        marks = (
            self._weight_mark,
            added.scale,
            added.present,
            *(_mark(source, follows_optimizer=True) for source in sources),
        )
        if self._cached is None or not self._cached.holds_for(marks, sources):
            copies = tuple(source.detach().clone() for source in sources if source.device.type == "cpu")
            self._cached = _Cached(row_norms(weight, constants, *added.plain(), added.scale), marks, copies)
        return self._cached.norms


def _cacheable(*tensors: Tensor) -> bool:
    """Whether the tensors have version counters, and the result may outlive this call."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or any(tensor.is_inference() for tensor in tensors)
    )


def _mark(tensor: Tensor, follows_optimizer: bool) -> tuple[object, ...]:
    return (
        StorageWeakRef(tensor.untyped_storage()),
        tensor.data_ptr(),
        tensor._version,
        tensor.dtype,
        _CLOCK.steps if follows_optimizer else None,
    )
