"""`RoutedUpdate`: one shared pair of factors, N cheap scalings of it, and a router that mixes them token by token.

Where the mixture does not depend on the input (one expert, or fixed equal shares) the update is a plain low-rank one,
with everything that follows: it merges, it converts, it can be weight-decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranktune.balance import BalanceTerm
from ranktune.block_gates import BlockGates
from ranktune.errors import ConfigError
from ranktune.gate_usage import GateUsage
from ranktune.mixture import BalanceTap, in_compute_dtype, mixture_delta, mixture_linear, route
from ranktune.update import Base, LowRankUpdate


class RoutedUpdate(LowRankUpdate):
    """``s sum_i G_i(x) diag(expert_B_i) B diag(expert_A_i) A`` with ``G = softmax(router x)``, or 1 / N.

    Args:
        in_features, out_features, capacity: see `LowRankUpdate`; the capacity is r, shared by all experts.
        num_experts: N.
        routed: whether there is a router; else every expert's share is 1 / N.
        router_bias: whether the router has a bias.
        balance_weight: of a load-balancing loss on the router that takes effect by itself, or 0.
        dropout: see `LowRankUpdate`. The router sees the input before dropout.

    Attributes:
        expert_A: [N, r]. expert_B: [N, out]. router: [N, in] or None. router_bias: [N] or None. All at least float32.
        block: with a router that several modules share, what connects them; `router` is None in all but one of them.
        usage: where forward notes the gates while somebody wants to know how experts are used, or None.
    """

    router: nn.Parameter | None
    router_bias: nn.Parameter | None

    _COMPONENT_DIM: ClassVar[dict[str, int]] = {**LowRankUpdate._COMPONENT_DIM, "expert_A": 1}
    _WIDE: ClassVar[tuple[str, ...]] = (*LowRankUpdate._WIDE, "expert_A", "expert_B", "router", "router_bias")
    UNDECAYED: ClassVar[tuple[str, ...]] = (*LowRankUpdate.UNDECAYED, "expert_A", "expert_B", "router", "router_bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        capacity: int,
        *,
        num_experts: int,
        routed: bool,
        router_bias: bool,
        balance_weight: float,
        dropout: float,
    ) -> None:
        super().__init__(in_features, out_features, capacity, dropout=dropout)
        self.expert_A = nn.Parameter(torch.empty(num_experts, capacity))
        self.expert_B = nn.Parameter(torch.empty(num_experts, out_features))
        self.register_parameter("router", nn.Parameter(torch.empty(num_experts, in_features)) if routed else None)
        self.register_parameter("router_bias", nn.Parameter(torch.empty(num_experts)) if router_bias else None)
        self.routed = routed
        self.block: BlockGates | None = None
        self.usage: GateUsage | None = None
        self._balance = BalanceTerm(balance_weight) if balance_weight else None

    def train(self, mode: bool = True) -> RoutedUpdate:
        """Set the mode, and make what backward will gather the load-balancing loss in: a compiler could not."""
        super().train(mode)
        self.balance_leaves()
        return self

    def share(self, block: BlockGates) -> None:
        """Take part in a block's router from now on, and give up an own one unless it is that."""
        self.block = block
        if block.owner is not self:
            self.drop_router()

    def drop_router(self) -> None:
        """Have no router of one's own: another module's decides."""
        self.router = self.router_bias = None

    @property
    def num_experts(self) -> int:
        """N."""
        return self.expert_A.shape[0]

    @property
    def mergeable(self) -> bool:
        """Whether the update is the same for every input."""
        return not self.routed or self.num_experts == 1

    def gates(self, x: Tensor) -> Tensor:
        """G [..., N] for x [..., in], at least float32; they sum to one."""
        if not self.routed:
            return self.expert_A.new_full((*x.shape[:-1], self.num_experts), 1.0 / self.num_experts)
        if self.block is not None:
            return self.block.peek(self, x)
        return route(x, self._own_router(), self.router_bias)

    def forward(self, x: Tensor, base: Base, scale: float) -> Tensor:
        """The adapted layer's output [..., out] for x [..., in], through a fused op."""
        if not self.routed:
            return super().forward(x, base, scale)
        given = None if self.block is None else self.block.take(self, in_compute_dtype(x)).flatten(0, -2)
        y, gates = mixture_linear(
            x,
            base.weight,
            base.bias,
            self.lora_A,
            self.lora_B,
            self.expert_A,
            self.expert_B,
            None if given is not None else self._own_router(),
            scale,
            router_bias=None if given is not None else self.router_bias,
            gates=given,
            dropout=self.dropout if self.training else 0.0,
            balance=None if given is not None else self.balance_leaves(),
        )
        self._note(gates)
        return y

    def plain_delta(self, x: Tensor, base_output: Tensor, base: Callable[[], Base], scale: float) -> Tensor:
        """See `LowRankUpdate.plain_delta`."""
        if not self.routed:
            return super().plain_delta(x, base_output, base, scale)
        dtype = base_output.dtype
        gates = self.gates(x.to(dtype)) if self.block is None else self.block.take(self, x.to(dtype))
        self._note(gates.flatten(0, -2))
        if self.block is None and (leaves := self.balance_leaves()) is not None:
            tapped = BalanceTap.apply(gates.flatten(0, -2), x.detach().to(dtype).flatten(0, -2), *leaves)
            gates = cast(Tensor, tapped).view_as(gates)
        dropped = F.dropout(x.to(dtype), self.dropout if self.training else 0.0)
        return mixture_delta(dropped, gates, self.lora_A, self.lora_B, self.expert_A * scale, self.expert_B)

    def require_mergeable(self) -> None:
        """See `LowRankUpdate.require_mergeable`."""
        if not self.mergeable:
            raise ConfigError(
                "a mor adapter with a router cannot be merged, converted or written as one weight: its update depends "
                "on the input. `ranktune export --approximate mean_gate` (in Python ranktune.mean_gate(model, "
                "batches)) makes a plain LoRA adapter that approximates it, and tells the error; or train with "
                "router='uniform', which merges exactly."
            )

    def factors(self, scale: float) -> tuple[Tensor, Tensor, float]:
        """See `LowRankUpdate.factors`.

        Raises:
            ConfigError: the update depends on its input, so no two factors make it.
        """
        self.require_mergeable()
        shares = self.expert_A.new_full((self.num_experts,), 1.0 / self.num_experts)
        return self.lora_A, self.static_B(shares), scale

    def static_B(self, shares: Tensor) -> Tensor:  # noqa: N802
        """``sum_i g_i diag(expert_B_i) B diag(expert_A_i)`` [out, r] for constant gates g [N]."""
        return self.lora_B * ((self.expert_B.T * shares) @ self.expert_A)

    def _note(self, gates: Tensor) -> None:
        """Count the gates [n, N] for whoever wants to know, in the mode that is asked about."""
        if self.usage is not None and self.usage.training == self.training:
            self.usage.add(gates)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedUpdate:
        super()._apply(fn, recurse)
        self.balance_leaves()
        return self

    def _own_router(self) -> nn.Parameter:
        if self.router is None:
            raise AttributeError("this update has no router of its own, and is not connected with the one it shares")
        return self.router

    def balance_leaves(self) -> tuple[Tensor, Tensor] | None:
        """Where backward puts the gradient of the load-balancing loss, in training."""
        if self._balance is None or self.router is None or not (self.training and torch.is_grad_enabled()):
            return None
        return self._balance.leaves(self.router)
