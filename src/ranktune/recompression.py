"""A low-rank matrix by its singular values, without ever forming it: QR of its two factors and a small SVD between.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the product ``B A`` is ``Q_B (R_B R_A^T) Q_A^T``, and the [r, r] matrix in
the middle has the same singular values. What truncation to k of them loses is known beforehand (Eckart, Young 1936):
``||B A - (B A)_k||_F^2 = sum_{i > k} sigma_i^2``, and no other matrix of rank k loses less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SingularForm:
    """``left diag(values) right``, values falling.

    Attributes:
        left: [out, k]. values: [k]. right: [k, in].
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [k, in] and B [out, k] of the best approximation of at most this rank, equally large."""
        root = self.values[:rank].sqrt()
        return root.unsqueeze(1) * self.right[:rank], self.left[:, :rank] * root

    def error(self, rank: int) -> float:
        """What that approximation loses, as a share of the Frobenius norm; 0 for a zero matrix."""
        squares = self.values.double().square()
        total = float(squares.sum())
        return (float(squares[rank:].sum()) / total) ** 0.5 if total > 0.0 else 0.0


def singular_form(A: Tensor, B: Tensor) -> SingularForm:
    """Of ``B A``, for A [r, in] and B [out, r]; at least float32."""
    wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    q_out, r_out = torch.linalg.qr(B.to(wide))
    q_in, r_in = torch.linalg.qr(A.to(wide).T)
    left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return SingularForm(q_out @ left, values, right @ q_in.T)


def dense_singular_form(matrix: Tensor) -> SingularForm:
    """Of a matrix [out, in] that is not low-rank; at least float32, cubic in the smaller side."""
    left, values, right = torch.linalg.svd(
        matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False
    )
    return SingularForm(left, values, right)


def product_norm(A: Tensor, B: Tensor) -> float:
    """``||B A||_F`` for A [r, in] and B [out, r], in float64 and without forming it."""
    r_out = torch.linalg.qr(B.double(), mode="r").R
    r_in = torch.linalg.qr(A.double().T, mode="r").R
    return float((r_out @ r_in.T).norm())


def difference_norm(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """``||B A - B' A'||_F`` for two pairs (A, B), of whatever ranks."""
    A = torch.cat([left[0].double(), right[0].double()])
    B = torch.cat([left[1].double(), -right[1].double()], 1)
    return product_norm(A, B)
