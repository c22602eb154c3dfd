"""Weight decomposition (DoRA): row norms of ``V = W + s B A`` without ever forming V, and the gain ``m / ||V||``.

The squared norm of row j expands to (Liu 2024, section 4.3; the factored form is that of arXiv 2603.22276)

    ||V_j||^2 = ||W_j||^2 + 2 s <B_j, (W A^T)_j> + s^2 B_j (A A^T) B_j^T

whose first term is a constant of the frozen weight. The rest needs [out, r] and [r, r] temporaries and one product
with W, where a dense norm needs three [out, in] ones. Everything is at least float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ranktune.frozen_weight import FrozenRows, Weight, input_gradient

# Rows of a low-precision weight are widened this many at a time, so that no [out, in] float32 copy exists.
_CHUNK_ROWS = 1024
# Below this share of ||W_j||^2 the expansion has cancelled and the row is computed densely.
_CANCELLED = 1e-4
# A gain this near zero cannot be divided by: backward recomputes the unscaled output instead.
_SMALL_GAIN = 1e-3


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, magnitudes and gains for a weight of this dtype: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class WeightNorms:
    """What the norms need of the frozen weight alone.

    Attributes:
        squared: ``||W_j||^2`` [out], at least float32.
        floor: the smallest norm a row may have, 1e-6 of the mean row norm (scalar), so that a zero row gives no 0 / 0.
    """

    squared: Tensor
    floor: Tensor


def weight_norms(weight: Weight) -> WeightNorms:
    """The constants of a frozen weight [out, in]."""
    wide = norm_dtype(weight.dtype)
    squared = torch.cat([rows.to(wide).square().sum(1) for rows in _blocks(weight)])
    return WeightNorms(squared, squared.sqrt().mean().mul(1e-6).clamp_min(1e-12))


def row_norms(
    weight: Weight, constants: WeightNorms, A: Tensor, B: Tensor, scale: float, *, guard: bool = True
) -> Tensor:
    """``max(||W_j + s (B A)_j||, floor)`` for every row j.

    Args:
        weight: [out, in], any dtype, or in blocks of rows. constants: its `weight_norms`.
        A: [r, in]. B: [out, r]. scale: s.
        guard: recompute densely the rows where the update nearly cancels the weight. It reads one flag back from
            the device, so it is off inside ``torch.compile``.

    Returns:
        [out], at least float32; differentiable in A and B where gradients are enabled.
    """
    squared, floor = constants.squared, constants.floor
    wide = squared.dtype
    A, B = A.to(wide), B.to(wide)
    total = (squared + (B * _twice_cross_plus_gram(weight, A, B, scale)).sum(1)).clamp_min(0.0)
    if guard:
        cancelled = total.detach() < _CANCELLED * squared
        if cancelled.any():
            rows = cancelled.nonzero().squeeze(1)
            dense = (weight[rows].to(wide) + scale * (B[rows] @ A)).square().sum(1)
            total = total.index_copy(0, rows, dense)
    if not total.requires_grad:
        return total.sqrt().clamp_min(floor)
    # sqrt has an infinite slope at zero: rows at the floor take the constant, and a zero gradient.
    above = total > floor * floor
    return torch.where(above, torch.where(above, total, 1.0).sqrt(), floor)


def _twice_cross_plus_gram(weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``2 s W A^T + s^2 B A A^T`` [out, r]: its rows times those of B are what the update adds to ``||W_j||^2``."""
    gram = A @ A.T
    if isinstance(weight, FrozenRows) and A.requires_grad and torch.is_grad_enabled():
        return torch.addmm(_CrossProduct.apply(weight, A), B, gram, beta=2.0 * scale, alpha=scale * scale)
    parts = [
        torch.addmm(rows.to(A.dtype) @ A.T, B_rows, gram, beta=2.0 * scale, alpha=scale * scale)
        for rows, B_rows in zip(_blocks(weight), B.split(_block_size(weight)), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _block_size(weight: Weight) -> int:
    return weight.block if isinstance(weight, FrozenRows) else _CHUNK_ROWS


def _blocks(weight: Weight) -> Iterable[Tensor]:
    return weight.blocks() if isinstance(weight, FrozenRows) else weight.split(_CHUNK_ROWS)


class _CrossProduct(torch.autograd.Function):
    """``W A^T`` [out, r] for a weight in blocks of rows: they are made again in backward, and never kept."""

    @staticmethod
    def forward(ctx: Any, weight: FrozenRows, A: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.cat([rows.to(A.dtype) @ A.T for rows in weight.blocks()])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, input_gradient(gradient.T, ctx.weight)


def gain_offset(magnitude: Tensor, norms: Tensor) -> Tensor:
    """``m / n - 1`` [out], formed as ``(m - n) / n`` so that it is exactly zero where m equals n."""
    return (magnitude - norms) / norms


def has_small_gain(offset: Tensor) -> bool:
    """Whether some gain is too near zero for the output to be divided by it."""
    return bool(((offset + 1.0).abs() < _SMALL_GAIN).any())
