"""How far rows are from orthonormal: ``||X X^T - I||_F``, not squared, and its slope."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of the matrices X X^T that are worked on at a time.
_BATCH = 1 << 20
_EPSILON = 1e-12  # under the root, whose slope is infinite where the rows are exactly orthonormal


def from_orthonormal(X: Tensor) -> Tensor:
    """``||X X^T - I||_F`` [...], at least float32, for rows X [..., k, length]."""
    X = _wide(X)
    return _root(_difference(X @ X.mT))


@torch.no_grad()
def add_slopes(terms: Sequence[tuple[Tensor, Tensor]], weight: Tensor | float) -> None:
    """Add ``w d||X X^T - I||_F / dX`` to gradients: of every pair (X [k, length], gradient of its leading rows).

    With ``S = 2 w (X X^T - I) / ||X X^T - I||_F`` [k, k], which is symmetric, it is ``S X``.

    Args:
        weight: w.
    """
    for together in _batches(terms):
        S = _difference(_products([X for X, _ in together]))
        S.mul_((2.0 * weight / _root(S))[:, None, None])
        for (X, gradient), slope in zip(together, S, strict=True):
            _add_product(gradient, slope[: gradient.shape[0]], X)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """``to += left @ right``, in one go where the types are the same, else in the widest of left and right."""
    if to.dtype == left.dtype == right.dtype:
        to.addmm_(left, right)
    else:
        wide = torch.promote_types(left.dtype, right.dtype)
        to.add_(left.to(wide) @ right.to(wide))


def _wide(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _batches(terms: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Those that make matrices of one size in one place, a few at a time where these are large."""
    alike: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for X, gradient in terms:
        # On the CPU only the small matrices are put together, so the rows may differ in length.
        length = None if X.device.type == "cpu" else X.shape[1]
        alike[X.shape[0], X.dtype, X.device, length].append((X, gradient))
    for group in alike.values():
        at_a_time = max(1, _BATCH // group[0][0].shape[0] ** 2)
        yield from (group[first : first + at_a_time] for first in range(0, len(group), at_a_time))


def _products(matrices: Sequence[Tensor]) -> Tensor:
    """X X^T of each [n, k, k]: one launch on a GPU, and on the CPU no copy of what is multiplied."""
    wide = [_wide(X) for X in matrices]
    if wide[0].device.type == "cpu":
        return torch.stack([X @ X.mT for X in wide])
    X = torch.stack(wide)
    return X @ X.mT


def _difference(products: Tensor) -> Tensor:
    """``X X^T - I`` in place of X X^T."""
    products.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return products


def _root(difference: Tensor) -> Tensor:
    return (difference.square().sum((-2, -1)) + _EPSILON).sqrt()
