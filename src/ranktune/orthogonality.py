"""How far rows are from orthonormal: ``||X X^T - I||_F``, not squared, and its slope."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-12  # under the root, whose slope is infinite where the rows are exactly orthonormal


def from_orthonormal(X: Tensor) -> Tensor:
    """``||X X^T - I||_F`` [...], at least float32, for rows X [..., k, length]."""
    return _root(_difference(_wide(X)))


def slope_from_orthonormal(X: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """What X is multiplied by in the slope of that distance, [..., k, k], symmetric and at least float32.

    ``w d||X X^T - I||_F / dX = S X`` with ``S = 2 w (X X^T - I) / ||X X^T - I||_F`` and w the weight.
    """
    difference = _difference(_wide(X))
    return difference.mul_((2.0 * weight / _root(difference))[..., None, None])


def add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """``to += left @ right``, in one go where the types are the same, else in the widest of left and right."""
    if to.dtype == left.dtype == right.dtype:
        to.addmm_(left, right)
    else:
        wide = torch.promote_types(left.dtype, right.dtype)
        to.add_(left.to(wide) @ right.to(wide))


def _wide(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _difference(X: Tensor) -> Tensor:
    difference = X @ X.mT
    difference.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return difference


def _root(difference: Tensor) -> Tensor:
    return (difference.square().sum((-2, -1)) + _EPSILON).sqrt()
