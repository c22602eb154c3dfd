"""What a nested update loses when it is cut: norms of differences between its ranks, from Gram matrices alone.

A nested update is ``dW_b = s_b sum_{k <= b} B_k A_k`` at rank b, with a scale of its own for every rank. All inner
products between its ranks are sums over leading blocks of one [r, r] matrix, ``<dW_b, dW_c> = s_b s_c sum_{i <= b,
j <= c} (B^T B)_ij (A A^T)_ij``: nothing of the size of a weight is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cut_energy(A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """``||dW_r - dW_b||_F^2`` for b = 1 to r, so the last one is 0.

    Args:
        A: [r, in]. B: [out, r]. scales: [r], s_b of each rank.

    Returns:
        [r] in float64, on the CPU: differences of nearly equal matrices need the digits.
    """
    A, B, scales = (tensor.detach().to("cpu", torch.float64) for tensor in (A, B, scales))
    inner = ((B.T @ B) * (A @ A.T)).cumsum(0).cumsum(1) * scales.unsqueeze(1) * scales
    squares = inner.diagonal()
    return (squares + squares[-1] - 2.0 * inner[-1]).clamp(min=0.0)
