"""The low-rank update as algebra: ``y = (1 + o) * (W x + s B diag(c) A d(x)) + bias`` in one autograd node.

``W`` is frozen, ``A`` [r, in], ``B`` [out, r] and the gates ``c`` [r], where there are any, are trained, ``d`` is
dropout, ``s`` the scale and ``o`` [out] the gain offset of a weight-decomposed layer (``None`` for plain LoRA, where it
would be zero). Composing the same formula
from stock operators writes the output four times and keeps the dropped-out input; here the low-rank product is added
into the base output and into the input gradient in place, and backward keeps the input, ``A d(x)`` and one byte per
dropped element. Of a nested or growing update only a `Span` of components takes part, and backward does the work of its
trained ones alone.

Every function here is pure torch: no module, no configuration, no PEFT. Tokens are flattened to one dimension: x is
[n, in], y is [n, out].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ranktune.frozen_weight import Weight, input_gradient, keep_weight, kept_weight, linear, product
from ranktune.sensitivity import sensitivity

# Tokens per slice of a sum over tokens on the CPU, and of a product that sums over them; the width from which on the
# product gains by it (a fifth of its time at rank 64 on one core; below, and on two, nothing either way).
_SLICE, _PRODUCT_SLICE, _WIDE = 256, 512, 3072


class Span(NamedTuple):
    """The leading components of a nested or growing update that take part, and those of them that are trained.

    Attributes:
        first: index of the first trained component.
        end: how many components take part; the last of them, ``end - 1``, is trained.
    """

    first: int
    end: int


class Components(NamedTuple):
    """What an update adds in one pass: ``s B diag(gate) A`` over the components of a span.

    Attributes:
        A: [r, in]. B: [out, r]. scale: s. All r components, whether they take part or not.
        gate: [r], at least float32, or None.
        span: which of the components take part and are trained; None is all of them.
        gates_trained: how many of the leading gates are trained; None is all that take part. The others are constants.
    """

    A: Tensor
    B: Tensor
    scale: float
    gate: Tensor | None = None
    span: Span | None = None
    gates_trained: int | None = None

    @property
    def present(self) -> int:
        """How many take part."""
        return len(self.A) if self.span is None else self.span.end

    def plain(self) -> tuple[Tensor, Tensor]:
        """A [k, in] and ``B diag(gate)`` [out, k] for stock operators, of the components that take part."""
        A, B, gate = self.A, self.B, self.gate
        if self.span is not None and self.span != (0, len(A)):
            A, B = _TrainedSpan.apply(A, self.span, 0), _TrainedSpan.apply(B, self.span, 1)
        if gate is None:
            return A, B
        gate = gate[: len(A)]
        if self.gates_trained is not None and self.gates_trained < len(A):
            gate = torch.cat([gate[: self.gates_trained], gate[self.gates_trained :].detach()])
        return A, B * gate


def low_rank_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    offset: Tensor | None = None,
    dropout: float = 0.0,
    drop_base_path: bool = True,
    small_gain: bool = False,
    score: Tensor | None = None,
    span: Span | None = None,
    gate: Tensor | None = None,
    gates_trained: int | None = None,
) -> Tensor:
    """Apply a frozen linear layer and its low-rank update in one autograd node.

    Args:
        x: [..., in], the layer's input.
        weight: [out, in], frozen (it gets no gradient); any strides, so a transposed view serves ``Conv1D``; or one
            that comes in blocks of rows, of which backward makes one at a time.
        bias: [out] or None, frozen; added once and never scaled by the gain.
        A: [r, in]. B: [out, r]. Cast to the compute dtype, which is autocast's where it is on, else x's.
        scale: s, multiplies ``B A``.
        offset: [out], float32 or wider, ``m / ||W + s B A|| - 1``. Its gradient is exact.
        dropout: probability in [0, 1) of zeroing an element of the update's input.
        drop_base_path: with ``offset`` and dropout, whether the gain's share of the base output also sees the
            dropped-out input (DoRA's two paths; a second product with ``weight``) or only the low-rank path does.
        small_gain: some ``1 + offset`` is so near zero that the output cannot be divided by it; backward then
            recomputes the unscaled output with one more product.
        score: [1], a leaf whose gradient shall be the update's sensitivity (`ranktune.sensitivity`): one more product
            in backward.
        span: the components that take part and are trained, out of the r; None is all of them. The others' gradients
            are zero.
        gate: [r], at least float32, or None. gates_trained: how many of the leading ones, see `Components`.

    Returns:
        [..., out] in the compute dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = x.reshape(-1, x.shape[-1])
    span = Span(0, A.shape[0]) if span is None else span
    dropped = draw_dropped(flat, dropout) if dropout > 0.0 else None
    survival = 1.0 / (1.0 - dropout)
    with torch.autocast(x.device.type, enabled=False):
        if offset is not None and dropped is not None and drop_base_path:
            y = _TwoPathLinear.apply(
                flat, weight, bias, A, B, gate, scale, span, gates_trained, offset, dropped, survival, score
            )
        else:
            y = _LowRankLinear.apply(
                flat, weight, bias, A, B, gate, scale, span, gates_trained, offset, dropped, survival, small_gain, score
            )
    return y.view(*x.shape[:-1], y.shape[-1])


def draw_dropped(x: Tensor, dropout: float) -> Tensor:
    """Draw the elements that dropout zeroes: bool [n, in], with the random numbers that ``F.dropout`` would take."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout).logical_not_()


def zero_dropped(x: Tensor, dropped: Tensor | None) -> Tensor:
    """x with the dropped elements zeroed. The factor 1 / (1 - p) goes to the small side of each product."""
    return x if dropped is None else torch.where(dropped, x.new_zeros(()), x)


def _gain_times(value: Tensor, offset: Tensor) -> Tensor:
    """``(1 + offset) * value`` in value's dtype, the sum formed in offset's wider one.

    In bfloat16 a gain near one has a spacing of 2^-8 and would lose what it learnt; its offset does not.
    """
    if value.dtype == offset.dtype:
        return value * (offset + 1.0)
    return torch.addcmul(value, value, offset, out=torch.empty_like(value))


def _column_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of a * b over tokens: [n, out], [n, out] -> [out].

    On the CPU in slices that stay in its cache, without an [n, out] temporary.
    """
    if a.device.type != "cpu" or a.dtype != dtype:
        return (a * b).sum(0, dtype=dtype)
    total = a.new_zeros(_SLICE, a.shape[1])
    for a_rows, b_rows in zip(a.split(_SLICE), b.split(_SLICE), strict=True):
        total[: a_rows.shape[0]].addcmul_(a_rows, b_rows)
    return total.sum(0)


def _column_sum(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of a over tokens: [n, out] -> [out]."""
    return a.new_ones(a.shape[0]) @ a if a.dtype == dtype else a.sum(0, dtype=dtype)


def _leading(
    A: Tensor, B: Tensor, gate: Tensor | None, span: Span, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The components that take part, in the compute dtype: A [end, in], ``scale B diag(gate)`` [out, end]."""
    A, B = A[: span.end], B[:, : span.end]
    if gate is not None:
        B = B * (gate[: span.end] * scale)
    elif scale != 1.0:
        B = B * scale
    return A.to(dtype), B.to(dtype)


def _factor_gradients(
    ctx: Any, x: Tensor, u: Tensor, du: Tensor, dv: Tensor, A: Tensor, B: Tensor, gate: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of A, B and the gates, zero but for the trained components.

    With p the survival and ``D = s dv^T u`` [out, r], they are ``p du^T x`` [r, in], ``D diag(gate)`` and
    ``sum_j B_ji D_ji``.

    Args:
        ctx: of the node. x: [n, in], dropped elements zeroed. u, du: [n, end]. dv: [n, out]. A, B, gate: whole.
    """
    span, dA, dB, d_gate = ctx.span, None, None, None
    _, _, _, needs_A, needs_B, needs_gate, *_ = ctx.needs_input_grad
    if needs_A:
        rows = _sum_over_tokens(du[:, span.first :], x).mul_(ctx.survival)
        dA = rows.to(A.dtype) if rows.shape == A.shape else _among_zeros(rows, A, span, 0)
    if needs_B or needs_gate:
        D = _sum_over_tokens(u[:, span.first :], dv).mul_(ctx.scale).T
        if gate is None:
            dB = D.to(B.dtype) if D.shape == B.shape else _among_zeros(D, B, span, 1)
        else:
            dB = _among_zeros(D, B, span, 1)  # in the layout of B, in which it is gated
            D = dB[:, span.first : span.end]
            d_gate = _gate_gradient(D, B, gate, span.first, ctx.gates_trained) if needs_gate else None
            D.mul_(gate[span.first : span.end])
    return dA, dB if needs_B else None, d_gate


def _sum_over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right``: [n, k], [n, width] -> [k, width]."""
    # In 16 bits the sum would be rounded after every slice.
    if left.device.type != "cpu" or right.shape[1] < _WIDE or right.dtype.itemsize < 4:
        return left.T @ right
    total = left.new_zeros(left.shape[1], right.shape[1])
    for left_rows, right_rows in zip(left.split(_PRODUCT_SLICE), right.split(_PRODUCT_SLICE), strict=True):
        total.addmm_(left_rows.T, right_rows)
    return total


def _gate_gradient(D: Tensor, B: Tensor, gate: Tensor, first: int, trained: int | None) -> Tensor:
    """``sum_j B_ji D_ji`` [r] for the trained gates from ``first`` on; D [out, k] begins there. Zero elsewhere."""
    end = first + D.shape[1] if trained is None else trained
    gradient = torch.zeros_like(gate)
    gradient[first:end] = (D[:, : end - first].to(gate.dtype) * B[:, first:end]).sum(0)
    return gradient


def _among_zeros(gradient: Tensor, whole: Tensor, span: Span, dim: int) -> Tensor:
    """The gradient of the trained components of a tensor at their place in one for all components."""
    placed = torch.empty_like(whole)
    placed.narrow(dim, 0, span.first).zero_()
    placed.narrow(dim, span.first, span.end - span.first).copy_(gradient)
    placed.narrow(dim, span.end, whole.shape[dim] - span.end).zero_()
    return placed


class _TrainedSpan(torch.autograd.Function):
    """The components of a tensor that take part, as a view; backward drops the gradient of those not trained."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, span: Span, dim: int) -> Tensor:
        ctx.span, ctx.dim = span, dim
        ctx.save_for_backward(whole)
        return whole.narrow(dim, 0, span.end)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (whole,) = ctx.saved_tensors
        trained = gradient.narrow(ctx.dim, ctx.span.first, ctx.span.end - ctx.span.first)
        return _among_zeros(trained, whole, ctx.span, ctx.dim), None, None


class _LowRankLinear(torch.autograd.Function):
    """``y = (1 + o) (W x + s B diag(c) A d(x)) + bias``: one pass through W forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        scale: float,
        span: Span,
        gates_trained: int | None,
        offset: Tensor | None,
        dropped: Tensor | None,
        survival: float,
        small_gain: bool,
        score: Tensor | None,  # noqa: ARG004  (only its gradient matters)
    ) -> Tensor:
        y = linear(x, weight, bias)
        A_span, B_span = _leading(A, B, gate, span, x.dtype)
        u = zero_dropped(x, dropped) @ (A_span * survival).T
        y.addmm_(u, B_span.T, alpha=scale)
        if offset is not None:
            # (1 + o)(y - bias) + bias: exactly y where o is zero, so a fresh adapter changes no bit.
            if bias is None:
                torch.addcmul(y, y, offset, out=y)
            else:
                torch.addcmul(bias * -offset, y, offset + 1.0, out=y)
        ctx.scale, ctx.survival, ctx.span, ctx.gates_trained = scale, survival, span, gates_trained
        ctx.output = None
        kept_output = None
        if offset is not None and ctx.needs_input_grad[9] and not small_gain:
            # The gain's gradient needs the unscaled output, and the output itself gives it. Saved under a version
            # counter of its own, because some models add to it in place; an empty tensor on the output's counter
            # tells backward whether that happened.
            kept_output = y.data
            ctx.output = y.detach()
            ctx.output.set_()  # pyright: ignore[reportCallIssue]
            ctx.output_version = ctx.output._version
        ctx.save_for_backward(x, keep_weight(ctx, weight), bias, A, B, gate, u, offset, dropped, kept_output)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, A, B, gate, u, offset, dropped, y = ctx.saved_tensors
        weight = kept_weight(ctx, weight)
        needs, span = ctx.needs_input_grad, ctx.span
        A_span, sB = _leading(A, B, gate, span, x.dtype, ctx.scale)
        d_offset = None
        if needs[9]:
            if y is not None and ctx.output._version == ctx.output_version:
                d_offset = _column_dot(dy, y, offset.dtype)
                if bias is not None:
                    d_offset.sub_(bias * _column_sum(dy, offset.dtype))
                d_offset.div_(offset + 1.0)
            else:
                unscaled = product(x, weight, bias).addmm_(u, sB.T)
                d_offset = _column_dot(dy, unscaled, offset.dtype)
        dv = dy if offset is None else _gain_times(dy, offset)
        du = dv @ sB
        dx = input_gradient(dv, weight) if needs[0] else None
        if dx is not None:
            if dropped is None:
                dx.addmm_(du, A_span)
            else:
                dx.add_((du @ (A_span * ctx.survival)).masked_fill_(dropped, 0.0))
        zeroed = zero_dropped(x, dropped) if needs[3] or needs[13] else x
        dA, dB, d_gate = _factor_gradients(ctx, zeroed, u, du, dv, A, B, gate)
        d_score = sensitivity(dv, zeroed, A_span, sB, ctx.survival) if needs[13] else None
        return dx, None, None, dA, dB, d_gate, None, None, None, d_offset, None, None, None, d_score


class _TwoPathLinear(torch.autograd.Function):
    """``y = W x + bias + o W d(x) + (1 + o) s B diag(c) A d(x)``: DoRA's dropout, with a second pass through W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        scale: float,
        span: Span,
        gates_trained: int | None,
        offset: Tensor,
        dropped: Tensor,
        survival: float,
        score: Tensor | None,  # noqa: ARG004
    ) -> Tensor:
        y = linear(x, weight, bias)
        zeroed = zero_dropped(x, dropped)
        A_span, B_span = _leading(A, B, gate, span, x.dtype)
        u = zeroed @ (A_span * survival).T
        y.addmm_(u, B_span.T, alpha=scale)
        unscaled = product(zeroed, weight, bias).addmm_(u, B_span.T, alpha=scale, beta=survival)
        torch.addcmul(y, unscaled, offset, out=y)
        ctx.scale, ctx.survival, ctx.span, ctx.gates_trained = scale, survival, span, gates_trained
        kept_unscaled = unscaled if ctx.needs_input_grad[9] else None
        ctx.save_for_backward(x, keep_weight(ctx, weight), A, B, gate, u, offset, dropped, kept_unscaled)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, A, B, gate, u, offset, dropped, unscaled = ctx.saved_tensors
        weight = kept_weight(ctx, weight)
        needs, span = ctx.needs_input_grad, ctx.span
        A_span, sB = _leading(A, B, gate, span, x.dtype, ctx.scale)
        d_offset = _column_dot(dy, unscaled, offset.dtype) if needs[9] else None
        dv = _gain_times(dy, offset)
        du = dv @ sB
        dx = None
        if needs[0]:
            # Not dv - dy: in bfloat16 a small offset would be lost in the difference.
            through_dropout = input_gradient(dy * offset.to(dy.dtype), weight)
            through_dropout.addmm_(du, A_span, alpha=ctx.survival, beta=ctx.survival)
            dx = input_gradient(dy, weight).add_(through_dropout.masked_fill_(dropped, 0.0))
        zeroed = zero_dropped(x, dropped) if needs[3] or needs[12] else x
        dA, dB, d_gate = _factor_gradients(ctx, zeroed, u, du, dv, A, B, gate)
        d_score = sensitivity(dv, zeroed, A_span, sB, ctx.survival) if needs[12] else None
        return dx, None, None, dA, dB, d_gate, None, None, None, d_offset, None, None, d_score
