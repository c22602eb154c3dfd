"""A mixture of rank experts as algebra: ``y = W x + bias + s sum_i G_i(x) diag(b_i) B diag(a_i) A d(x)``.

``W`` is frozen; ``A`` [r, in] and ``B`` [out, r] are shared by N experts, each of which has a scaling a_i [r] and
b_i [out]; ``G = softmax(W_g x + c)`` [N] is formed token by token in float32 or wider, from this layer's own input or
given by another one; ``d`` is dropout, which the router does not see. With ``h = A d(x)`` the sum is one product,

    s M^T z,    z = vec(G_i h) [N r],    M = [diag(a_i) B^T diag(b_i)] stacked over i [N r, out],

so nothing of size [tokens, N, out] is formed (the direct formula needs that twice). M is a few elementwise products of
the parameters, cheaper to make again than to keep: backward keeps x, h and G, and one byte per dropped element. For
given x the sum is bilinear in G and h with an N x r matrix of rank N for each output, so there is no formula with fewer
than N r multiplications a token and output, in any of the three products with M, z and dy.

Tokens are flattened to one dimension: x is [n, in], y is [n, out].
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ranktune.frozen_weight import Weight, input_gradient, keep_weight, kept_weight, linear
from ranktune.lowrank import draw_dropped, zero_dropped

# A gate at most this large is none.
_LEAST_GATE = 1e-30


def mixture_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    expert_A: Tensor,
    expert_B: Tensor,
    router: Tensor | None,
    scale: float,
    *,
    router_bias: Tensor | None = None,
    gates: Tensor | None = None,
    dropout: float = 0.0,
    balance: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply a frozen linear layer and a mixture of rank experts in one autograd node.

    Args:
        x: [..., in], the layer's input.
        weight: [out, in], frozen, as in `ranktune.lowrank.low_rank_linear`.
        bias: [out] or None, frozen.
        A: [r, in]. B: [out, r]. Used in the compute dtype, which is autocast's where it is on, else x's.
        expert_A: [N, r], the rows a_i. expert_B: [N, out], the rows b_i.
        router: [N, in], W_g, or None where the gates are given.
        scale: s.
        router_bias: c [N], or None.
        gates: [n, N] in float32 or wider, instead of a router's; they get a gradient.
        dropout: probability in [0, 1) of zeroing an element of the update's input.
        balance: leaves [N, in] and [1] whose gradients shall be that of `balance_gradient`, whatever the loss is
            multiplied by, and the number of times that it was added.

    Returns:
        The output [..., out] in the compute dtype, and G [n, N], without history.
    """
    x = in_compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1])
    dropped = draw_dropped(flat, dropout) if dropout > 0.0 else None
    survival = 1.0 / (1.0 - dropout)
    leaves = (None, None) if balance is None else balance
    with torch.autocast(x.device.type, enabled=False):
        y, used = _MixtureLinear.apply(
            flat, weight, bias, A, B, expert_A, expert_B, router, router_bias, gates, scale, dropped, survival, *leaves
        )
    return y.view(*x.shape[:-1], y.shape[-1]), used


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype where it is on."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def route(x: Tensor, router: Tensor, bias: Tensor | None = None) -> Tensor:
    """``G = softmax(W_g x + c)`` [..., N] for x [..., in], in float32 or wider whatever autocast says.

    Backward keeps x as it is, in no wider dtype; a compiler decides that itself.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _gates(x, router, bias) if torch.compiler.is_compiling() else _Route.apply(x, router, bias)


def mixture_delta(x: Tensor, gates: Tensor, A: Tensor, B: Tensor, expert_A: Tensor, expert_B: Tensor) -> Tensor:
    """``sum_i G_i diag(b_i) B diag(a_i) A x`` [..., out] from stock operators.

    Args:
        x: [..., in], after dropout, in the compute dtype. gates: [..., N].
    """
    h = F.linear(x, A.to(x.dtype))
    z = (gates.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2).to(x.dtype)
    return z @ stacked_up(B, expert_A, expert_B).to(x.dtype)


def stacked_up(B: Tensor, expert_A: Tensor, expert_B: Tensor) -> Tensor:
    """M [N r, out]: row (i, k) is ``a_ik b_i o B[:, k]``."""
    # Row by row through memory: as a strided view, B.T costs seven times as much.
    return (B.T.contiguous() * expert_B.unsqueeze(1)).mul_(expert_A.unsqueeze(2)).flatten(0, 1)


def balance_gradient(gates: Tensor, x: Tensor) -> Tensor:
    """The gradient [N, in] for the router of ``N sum_i f_i P_i`` (Switch Transformer, equation 4), at least float32.

    f_i is the share of tokens whose largest gate is i, a constant; P_i is the mean of G_i.

    Args:
        gates: G [n, N]. x: [n, in].
    """
    count, experts = gates.shape
    share = F.one_hot(gates.argmax(1), experts).sum(0).to(gates.dtype) * (experts / count**2)
    return _softmax_backward(gates, share).T @ x.to(gates.dtype)


class BalanceTap(torch.autograd.Function):
    """The gates [n, N] as they are; backward gives the leaves of a load-balancing term their gradients."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, x: Tensor, gradient: Tensor, count: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(gates, x)
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, d_gates: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gates, x = ctx.saved_tensors
        return d_gates, None, balance_gradient(gates, x), gates.new_ones(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _softmax(logits: Tensor) -> Tensor:
    """Gates [..., N]. Those too small to matter are zero.

    What they would be multiplied to is below the smallest normal number, where a processor is many times slower.
    """
    return F.threshold(torch.softmax(logits, -1), _LEAST_GATE, 0.0)


def _spread(gates: Tensor, h: Tensor) -> Tensor:
    """z [n, N r] in h's dtype: ``G_i h_k`` at (i, k)."""
    return (gates.unsqueeze(2) * h.unsqueeze(1)).flatten(1).to(h.dtype)


def _softmax_backward(gates: Tensor, d_gates: Tensor) -> Tensor:
    """The gradient at the logits [n, N] for that at the gates."""
    weighted = gates * d_gates
    return weighted - gates * weighted.sum(-1, keepdim=True)


def _gates(x: Tensor, router: Tensor, bias: Tensor | None) -> Tensor:
    wide = _wide(x)
    return _softmax(F.linear(x.to(wide), router.to(wide), None if bias is None else bias.to(wide)))


class _Route(torch.autograd.Function):
    """The gates [..., N] of x [..., in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor, bias: Tensor | None) -> Tensor:
        gates = _gates(x, router, bias)
        ctx.save_for_backward(x, router, gates)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gates: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, router, gates = ctx.saved_tensors
        d_logits = _softmax_backward(gates, d_gates)
        flat = d_logits.flatten(0, -2)
        dx = (d_logits @ router.to(gates.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        d_router = flat.T @ x.flatten(0, -2).to(gates.dtype) if ctx.needs_input_grad[1] else None
        return dx, d_router, flat.sum(0) if ctx.needs_input_grad[2] else None


class _MixtureLinear(torch.autograd.Function):
    """One pass through W forward, one backward; A and the router read x together where they may."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        expert_A: Tensor,
        expert_B: Tensor,
        router: Tensor | None,
        router_bias: Tensor | None,
        gates: Tensor | None,
        scale: float,
        dropped: Tensor | None,
        survival: float,
        balance: Tensor | None,  # noqa: ARG004  (only its gradient matters)
        balance_count: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, Tensor]:
        y = linear(x, weight, bias)
        wide = _wide(x)
        if router is not None and dropped is None and x.dtype == wide:
            # One reading of x: 16 columns take the time of 8.
            h, logits = (x @ torch.cat([A, router]).to(wide).T).split([A.shape[0], router.shape[0]], 1)
            h = h.contiguous()
        else:
            h = zero_dropped(x, dropped) @ (A * survival).to(x.dtype).T
            logits = None if router is None else x.to(wide) @ router.to(wide).T
        if logits is not None:
            gates = _softmax(logits if router_bias is None else logits + router_bias.to(wide))
        gates = cast(Tensor, gates).detach()
        y.addmm_(_spread(gates, h), stacked_up(B, expert_A * scale, expert_B).to(x.dtype))
        ctx.scale, ctx.survival = scale, survival
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(x, keep_weight(ctx, weight), A, B, expert_A, expert_B, router, h, gates, dropped)
        return y, gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, A, B, expert_A, expert_B, router, h, gates, dropped = ctx.saved_tensors
        weight = kept_weight(ctx, weight)
        needs = ctx.needs_input_grad
        M = stacked_up(B, expert_A * ctx.scale, expert_B).to(dy.dtype)
        dz = (dy @ M.T).to(gates.dtype).unflatten(1, expert_A.shape)
        dh = torch.bmm(gates.unsqueeze(1), dz).squeeze(1)
        d_gates = torch.bmm(dz, h.to(gates.dtype).unsqueeze(2)).squeeze(2)
        d_logits = None if router is None else _softmax_backward(gates, d_gates)
        low, d_low = A, dh
        if router is not None and d_logits is not None:
            low, d_low = torch.cat([A, router]), torch.cat([dh, d_logits], 1)
        dx = input_gradient(dy, weight) if needs[0] else None
        if dx is not None:
            if dropped is not None:
                dx.add_((dh.to(dy.dtype) @ (A * ctx.survival).to(dy.dtype)).masked_fill_(dropped, 0.0))
                if d_logits is not None:
                    dx.addmm_(d_logits.to(dy.dtype), low[len(A) :].to(dy.dtype))
            else:
                dx.addmm_(d_low.to(dy.dtype), low.to(dy.dtype))
        dA = dB = d_expert_A = d_expert_B = d_router = d_router_bias = None
        if any(needs[3:9]):
            if d_logits is not None and dropped is None and x.dtype == gates.dtype:
                dA, d_router = (d_low.T @ x).split([A.shape[0], d_logits.shape[1]])
            else:
                dA = (dh.to(x.dtype).T @ zero_dropped(x, dropped)).mul_(ctx.survival)
                d_router = None if d_logits is None else d_logits.T @ x.to(gates.dtype)
            d_router_bias = d_logits.sum(0) if d_logits is not None and needs[8] else None
            dM = (_spread(gates, h).T @ dy).to(gates.dtype).unflatten(0, expert_A.shape).mul_(ctx.scale)
            through_B = dM * B.T.contiguous()
            d_expert_A = torch.bmm(through_B, expert_B.to(gates.dtype).unsqueeze(2)).squeeze(2)
            d_expert_B = torch.bmm(expert_A.to(gates.dtype).unsqueeze(1), through_B).squeeze(1)
            dB = dM.mul_(expert_A.unsqueeze(2)).mul_(expert_B.unsqueeze(1)).sum(0).T
        d_balance = balance_gradient(gates, x) if needs[13] else None
        d_count = gates.new_ones(1) if needs[14] else None
        own = (dx, None, None, dA, dB, d_expert_A, d_expert_B, d_router, d_router_bias)
        return *own, d_gates if needs[9] else None, None, None, None, d_balance, d_count
