"""How far rows are from orthonormal: ``||X X^T - I||_F``, not squared, and its slope."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-12  # under the root, whose slope is infinite where the rows are exactly orthonormal


def from_orthonormal(X: Tensor) -> Tensor:
    """``||X X^T - I||_F`` [...], at least float32, for rows X [..., k, length]."""
    return _root(_difference(_wide(X)))


def from_orthonormal_slope(X: Tensor, weight: float = 1.0) -> Tensor:
    """``w d||X X^T - I||_F / dX = 2 w (X X^T - I) X / ||X X^T - I||_F`` [..., k, length], w the weight."""
    X = _wide(X)
    difference = _difference(X)
    return (difference * (2.0 * weight / _root(difference))[..., None, None]) @ X


def _wide(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _difference(X: Tensor) -> Tensor:
    return X @ X.mT - torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)


def _root(difference: Tensor) -> Tensor:
    return (difference.square().sum((-2, -1)) + _EPSILON).sqrt()
