"""`BalanceTerm`: a load-balancing loss on a router that takes effect by itself, once per optimizer step.

Its gradient is that of the mean over the micro-batches since the last step. What else the loss is multiplied by (a
gradient scaler, a division by the number of micro-batches) is not known inside backward; so the gradient is gathered
beside ``router.grad``, on leaves of its own, and added right before an optimizer that holds the router steps. That is
after gradient clipping, and needs no controller: the hook is on every optimizer of the process.

The term trains the router alone; it does not reach the layers below through x. Sharded routers (FSDP) are not covered.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ranktune.magnitude import norm_dtype
from ranktune.processes import mean_over_processes


class BalanceTerm:
    """``weight * N sum_i f_i P_i`` for one router.

    Copies and pickles start with nothing gathered.

    Args:
        weight: of the loss.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.router: nn.Parameter | None = None
        self._leaves: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BalanceTerm:
        return BalanceTerm(self.weight)

    def __reduce__(self) -> tuple[type[BalanceTerm], tuple[float]]:
        return (BalanceTerm, (self.weight,))

    def leaves(self, router: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The leaves [N, in] and [1] that backward shall give the gradient and a count of one."""
        if self._leaves is None or self.router is not router or self._leaves[0].device != router.device:
            self.router = router
            dtype = norm_dtype(router.dtype)
            self._leaves = (
                torch.zeros(router.shape, dtype=dtype, device=router.device, requires_grad=True),
                torch.zeros(1, dtype=dtype, device=router.device, requires_grad=True),
            )
            _TERMS.add(self)
        return self._leaves

    def take(self) -> Tensor | None:
        """The mean gradient gathered since the last time [N, in], or None."""
        if self._leaves is None:
            return None
        total, count = (leaf.grad for leaf in self._leaves)
        for leaf in self._leaves:
            leaf.grad = None
        return None if total is None or count is None else total / count * self.weight


_TERMS: weakref.WeakSet[BalanceTerm] = weakref.WeakSet()


@torch.no_grad()
def _add_to_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    """Add what was gathered to the gradients of the routers that this optimizer steps."""
    by_router = {id(term.router): term for term in _TERMS}
    if not by_router:
        return
    # In the optimizer's order, which is the same in every process.
    routers = [p for group in optimizer.param_groups for p in group["params"] if id(p) in by_router]
    due = [(p, mean) for p in routers if (mean := by_router[id(p)].take()) is not None]
    if not due:
        return
    means = mean_over_processes([mean for _, mean in due])
    scale = getattr(optimizer, "grad_scale", None)
    for (router, _), mean in zip(due, means, strict=True):
        if router.grad is not None:
            # A forward pass that overflowed under a gradient scaler is no step, but what it gathered would stay.
            mean = torch.where(torch.isfinite(mean).all(), mean, 0.0)
            router.grad.add_(mean if scale is None else mean * scale)


register_optimizer_step_pre_hook(_add_to_gradients)
