"""`LowRankUpdate`: the tensors of one adapter on one layer, and the update they make.

All tensors sit directly on this module (PEFT's checkpoint keys end in ``container.adapter.tensor``), magnitudes stay at
least float32 whatever the base's dtype, and row norms are reused while nothing they depend on has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranktune.lowrank import low_rank_linear
from ranktune.magnitude import gain_offset, has_small_gain, norm_dtype, row_norms
from ranktune.norm_cache import NormCache


@dataclass(frozen=True)
class Base:
    """The frozen layer under an adapter, as the update needs it.

    Attributes:
        weight: [out, in], any strides.
        bias: [out] or None.
    """

    weight: Tensor
    bias: Tensor | None


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
        self._cache = NormCache()

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
