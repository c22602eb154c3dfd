"""How sensitive the loss is to a low-rank update: ``sum |dW o G|`` with ``dW = s B A`` and ``G = dL/d(dW)``.

The absolute value lets no factored shortcut exist, so G has to be formed; it is formed and reduced in blocks of rows,
and never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of G and of dW that exist at a time.
_BLOCK = 1 << 19


def sensitivity(dv: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``sum_ij |(s B A)_ij (dv^T x)_ij|`` as [1], at least float32.

    Args:
        dv: [n, out], the gradient at ``s B A x``. x: [n, in], the update's input, after dropout.
        A: [r, in]. B: [out, r], gated. scale: s.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(1, dtype=wide, device=x.device)
    rows = max(1, _BLOCK // x.shape[1])
    for dv_rows, B_rows in zip(dv.split(rows, dim=1), B.split(rows), strict=True):
        G = (dv_rows.T @ x).to(wide)
        total += G.mul_(B_rows @ A).abs_().sum()
    return total * abs(scale)


class SensitivityTap(torch.autograd.Function):
    """The low-rank output as it is; in backward, the update's sensitivity becomes the gradient of ``score`` [1]."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, score: Tensor) -> Tensor:  # noqa: ARG004
        ctx.scale = scale
        ctx.save_for_backward(x, A, B)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, A, B = ctx.saved_tensors
        measured = sensitivity(dv.reshape(-1, dv.shape[-1]), x.reshape(-1, x.shape[-1]), A, B, ctx.scale)
        return dv, None, None, None, None, measured
