"""`LowRankUpdate`: the tensors of one adapter on one layer, and the update they make.

All tensors sit directly on this module (PEFT's checkpoint keys end in ``container.adapter.tensor``), magnitudes stay at
least float32 whatever the base's dtype, and row norms are reused while nothing they depend on has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ranktune.lowrank import low_rank_linear
from ranktune.magnitude import gain_offset, has_small_gain, norm_dtype, row_norms, squared_row_norms


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
class Base:
    """The frozen layer under an adapter, as the update needs it.

    Attributes:
        weight: [out, in], any strides.
        bias: [out] or None.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass
class _Snapshot:
    """What a cached norm was computed from: cheap marks of each tensor, and copies of the small ones on the CPU."""

    marks: tuple[object, ...]
    copies: tuple[Tensor, ...]


class _NormCache:
    """The row norms of one update, valid while weight, A, B and scale are what they were.

    A mark is (data pointer, version, optimizer clock). Writes through ``.data`` outside an optimizer leave all three
    alone; on the CPU, where reading a tensor costs no synchronisation, A and B are compared by value as well.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._weight_mark: object = None
        self._squared: Tensor | None = None
        self._snapshot: _Snapshot | None = None
        self._norms: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _NormCache:
        return _NormCache()

    def __reduce__(self) -> tuple[type[_NormCache], tuple[()]]:
        return (_NormCache, ())

    def squared(self, weight: Tensor) -> Tensor:
        """``||W_j||^2`` [out], recomputed when the weight has changed."""
        if not _cacheable(weight):
            return squared_row_norms(weight.detach())
        mark = _mark(weight, follows_optimizer=weight.requires_grad)
        if self._squared is None or self._weight_mark != mark:
            self._squared, self._weight_mark = squared_row_norms(weight.detach()), mark
        return self._squared

    def norms(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``||W_j + s (B A)_j||`` [out], detached."""
        squared = self.squared(weight)
        with torch.no_grad():
            if not _cacheable(weight, A, B):
                return row_norms(weight, squared, A, B, scale, guard=not torch.compiler.is_compiling())
            marks = (_mark(A, True), _mark(B, True), self._weight_mark, scale)
            found = self._snapshot
            same = found is not None and found.marks == marks
            if same and found is not None:
                same = all(torch.equal(copy, now) for copy, now in zip(found.copies, (A, B), strict=False))
            if not same or self._norms is None:
                self._norms = row_norms(weight, squared, A, B, scale)
                copies = (A.detach().clone(), B.detach().clone()) if A.device.type == "cpu" else ()
                self._snapshot = _Snapshot(marks, copies)
            return self._norms


def _cacheable(*tensors: Tensor) -> bool:
    """Whether the tensors have version counters, and the result may outlive this call."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or any(tensor.is_inference() for tensor in tensors)
    )


def _mark(tensor: Tensor, follows_optimizer: bool) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor._version, tensor.dtype, _CLOCK.steps if follows_optimizer else None)


class LowRankUpdate(nn.Module):
    """``s B A``, with a magnitude per output row where the adapter is weight-decomposed.

    Args:
        in_features, out_features: the base layer's shape.
        r: rank.
        dropout: probability on the update's input, in training.
        detach_norm: whether the norm is a constant in backward (DoRA section 4.3).
        dora_dropout: see `ranktune.config.RankConfig`.

    Attributes:
        lora_A: [r, in]. lora_B: [out, r].
        lora_magnitude_vector: m [out], at least float32, or None.
    """

    # Kept at float32 or wider when the module is cast: in bfloat16 a decomposed layer is no identity at the start.
    _wide = ("lora_magnitude_vector",)

    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        dropout: float = 0.0,
        detach_norm: bool = True,
        dora_dropout: Literal["both_paths", "low_rank_path"] = "both_paths",
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.detach_norm = detach_norm
        self.drop_base_path = dora_dropout == "both_paths"
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.register_parameter("lora_magnitude_vector", None)
        self._cache = _NormCache()

    @property
    def rank(self) -> int:
        """The number of rank-1 components."""
        return self.lora_A.shape[0]

    @property
    def decomposed(self) -> bool:
        """Whether the update has a magnitude (DoRA)."""
        return self.lora_magnitude_vector is not None

    def reset_parameters(self, identity: bool = True) -> None:
        """A Kaiming-uniform with a = sqrt(5); B zero, or random like A where the identity is not wanted."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if identity:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def init_magnitude(self, weight: Tensor, scale: float) -> int:
        """Add the magnitude, equal to the row norms of ``W + s B A``, so that W' = W + s B A at the start.

        On the meta device, where the values will come from a file, only the shape is made.

        Returns:
            The number of zero rows in ``weight``, whose norm is floored.
        """
        if self.lora_A.is_meta or weight.is_meta:
            norms = torch.empty(weight.shape[0], dtype=norm_dtype(weight.dtype), device="meta")
            self.lora_magnitude_vector = nn.Parameter(norms)
            return 0
        squared = self._cache.squared(weight)
        with torch.no_grad():
            norms = row_norms(weight, squared, self.lora_A, self.lora_B, scale)
        self.lora_magnitude_vector = nn.Parameter(norms)
        return int((squared == 0).sum())

    def forward(self, x: Tensor, base: Base, scale: float) -> Tensor:
        """The adapted layer's output [..., out] for x [..., in], through the fused op."""
        offset = self._gain_offset(base.weight, scale) if self.decomposed else None
        return low_rank_linear(
            x,
            base.weight,
            base.bias,
            self.lora_A,
            self.lora_B,
            scale,
            offset=offset,
            dropout=self.dropout if self.training else 0.0,
            drop_base_path=self.drop_base_path,
            small_gain=offset is not None and offset.requires_grad and has_small_gain(offset),
        )

    def plain_delta(self, x: Tensor, base_output: Tensor, base: Callable[[], Base], scale: float) -> Tensor:
        """What the update adds to ``base_output`` [..., out], from stock operators.

        It reads the base layer's output rather than its weight where it can, so that quantised, hooked and compiled
        layers work; ``base`` is called only where the weight itself is needed.
        """
        dtype = base_output.dtype
        dropout = self.dropout if self.training else 0.0
        dropped = F.dropout(x.to(dtype), dropout)
        low_rank = F.linear(F.linear(dropped, self.lora_A.to(dtype)), self.lora_B.to(dtype)) * scale
        if not self.decomposed:
            return low_rank
        layer = base()
        if dropout > 0.0 and self.drop_base_path:
            unscaled = F.linear(dropped, layer.weight.to(dtype))
        else:
            unscaled = base_output if layer.bias is None else base_output - layer.bias
        return (low_rank + self._gain_offset(layer.weight, scale) * (unscaled + low_rank)).to(dtype)

    def delta_weight(self, weight: Tensor, scale: float) -> Tensor:
        """``W' - W`` [out, in], at least float32: what forward adds in evaluation."""
        wide = norm_dtype(weight.dtype)
        delta = scale * (self.lora_B.to(wide) @ self.lora_A.to(wide))
        if self.decomposed:
            delta = delta + self._gain_offset(weight, scale).unsqueeze(1) * (weight.to(wide) + delta)
        return delta

    def _gain_offset(self, weight: Tensor, scale: float) -> Tensor:
        """``m / ||W + s B A|| - 1`` [out]."""
        if self.detach_norm or not torch.is_grad_enabled():
            norms = self._cache.norms(weight, self.lora_A, self.lora_B, scale)
        else:
            guard = not torch.compiler.is_compiling()
            squared = self._cache.squared(weight)
            norms = row_norms(weight, squared, self.lora_A, self.lora_B, scale, guard=guard)
        return gain_offset(cast(Tensor, self.lora_magnitude_vector), norms)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankUpdate:
        """Move or cast the tensors, keeping the wide ones at least float32."""
        before = {name: tensor.detach() for name in self._wide if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = getattr(self, name)
            if now.is_floating_point() and now.dtype.itemsize < 4:
                values = now if old.is_meta or now.is_meta else old.to(now.device)
                now.data = values.to(norm_dtype(now.dtype))
        return self
