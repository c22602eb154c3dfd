"""`BlockGates`: one router for the adapted modules of a transformer block, whose decision each of them uses.

The first of them to run in a pass decides, from its own input; the others take the same gates for the same tokens. A
pass has begun when a module asks that has asked already, so a pass that failed midway leaves nothing behind, and
gradient checkpointing may run a block again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ranktune.errors import ConfigError
from ranktune.mixture import BalanceTap, route

if TYPE_CHECKING:
    from ranktune.routed import RoutedUpdate


class BlockGates:
    """What the updates of one block share.

    Args:
        names: of the modules, for messages; the first has the router.
        owner: its update.
    """

    def __init__(self, names: list[str], owner: RoutedUpdate) -> None:
        self.names = names
        self.owner = owner
        self._gates: Tensor | None = None
        self._asked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin a new pass."""
        return {"names": self.names, "owner": self.owner, "_gates": None, "_asked": set()}

    def take(self, update: RoutedUpdate, x: Tensor) -> Tensor:
        """The gates [..., N] of this pass for one of the block's modules and its input x [..., in].

        Raises:
            ConfigError: the module's tokens are not those of the block, or the block's first module to run has an input
                of another width than the router.
        """
        if self._gates is None or id(update) in self._asked:
            self._gates, self._asked = self._decide(x), set()
        gates = self._matching(self._gates, x)
        self._asked.add(id(update))
        if len(self._asked) == len(self.names):
            self._gates, self._asked = None, set()
        return gates

    def peek(self, update: RoutedUpdate, x: Tensor) -> Tensor:
        """What `take` would give, without a part in the pass."""
        if self._gates is None or id(update) in self._asked:
            return route(x, *self._router(x))
        return self._matching(self._gates, x)

    def _decide(self, x: Tensor) -> Tensor:
        gates = route(x, *self._router(x))
        if (leaves := self.owner.balance_leaves()) is not None:
            tapped: Tensor = BalanceTap.apply(gates.flatten(0, -2), x.detach().flatten(0, -2), *leaves)
            gates = tapped.view_as(gates)
        return gates

    def _router(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        router = self.owner.router
        if router is None or x.shape[-1] != router.shape[1]:
            width = "nothing" if router is None else str(router.shape[1])
            raise ConfigError(
                f"shared_router: the router of {self.names[0]} reads inputs of width {width}, and of the modules that "
                f"share it ({', '.join(self.names)}) one with inputs of width {x.shape[-1]} was called first. Adapt "
                "the module that the block calls first, or leave shared_router out."
            )
        return router, self.owner.router_bias

    def _matching(self, gates: Tensor, x: Tensor) -> Tensor:
        if gates.shape[:-1].numel() != x.shape[:-1].numel():
            raise ConfigError(
                f"shared_router: gates were made for {gates.shape[:-1].numel()} tokens, and one of "
                f"{', '.join(self.names)} was called with {x.shape[:-1].numel()}: it sees other tokens than the "
                "block's first module, as cross-attention's keys and values or the experts of a mixture do. Leave it "
                "out with exclude_modules, or leave shared_router out."
            )
        return gates.view(*x.shape[:-1], gates.shape[-1]).to(x.device)
