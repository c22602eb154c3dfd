"""`RouterHealth`: how the experts of a mor adapter are used while it trains, and a warning when a router collapses.

Sums stay on the device; `read` is the one place that waits for it, so it belongs where a loss is logged. With several
processes each sees its own tokens.
"""

from __future__ import annotations

import logging

from torch import nn

from ranktune.adapters import updates
from ranktune.gate_usage import ExpertUse, GateUsage
from ranktune.routed import RoutedUpdate

logger = logging.getLogger("ranktune")

# A router has collapsed where so few experts carry the load, of any number, or such a share of them.
_FEWEST, _SMALLEST_SHARE = 1.5, 0.25


class RouterHealth:
    """Watches the routers of one adapter. An adapter without routers has none to watch, and then nothing happens.

    Args:
        model: the PEFT model.
        adapter_name: which adapter; the active one by default.

    Attributes:
        latest: module name to what its router did up to the latest `read`, since the one before.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        self.latest: dict[str, ExpertUse] = {}
        self._watched = {
            name: update
            for name, update in updates(model, adapter_name)
            if isinstance(update, RoutedUpdate) and update.router is not None and not update.mergeable
        }
        self._warned: set[str] = set()
        for update in self._watched.values():
            update.usage = GateUsage(training=True)

    def read(self, step: int) -> dict[str, float]:
        """Take what was summed since the last time, warn about routers that have collapsed, and sum it up.

        Args:
            step: optimizer steps done, for the message.

        Returns:
            ``router_entropy``, the mean over modules (1: every token uses all experts alike, 0: one alone), and
            ``router_top_load``, the largest share that one expert has of a module's load; nothing if nothing was seen.
        """
        taken = {name: update.usage.take() for name, update in self._watched.items() if update.usage is not None}
        self.latest = {name: use for name, use in taken.items() if use is not None}
        if not self.latest:
            return {}
        self._warn(step)
        return {
            "router_entropy": sum(use.entropy for use in self.latest.values()) / len(self.latest),
            "router_top_load": max(max(use.load) for use in self.latest.values()),
        }

    def close(self) -> None:
        """Stop watching."""
        for update in self._watched.values():
            update.usage = None

    def _warn(self, step: int) -> None:
        """Name the routers that have collapsed, each once."""
        collapsed = {name: use for name, use in self.latest.items() if has_collapsed(use)}
        new = {name: use for name, use in collapsed.items() if name not in self._warned}
        if not new:
            return
        self._warned.update(new)
        worst = min(new, key=lambda name: new[name].effective_experts)
        use = new[worst]
        logger.warning(
            "step %d: the router of %s has collapsed: one of its %d experts has %.0f%% of the load (as many as %.1f "
            "experts of equal load); so have %d of %d routers. router='balanced', a larger balance_weight or fewer "
            "experts may help.",
            step,
            worst,
            len(use.load),
            100 * max(use.load),
            use.effective_experts,
            len(collapsed),
            len(self.latest),
        )


def has_collapsed(use: ExpertUse) -> bool:
    """Whether the load is that of fewer than 1.5 experts, or than a quarter of them."""
    return use.effective_experts < max(_FEWEST, _SMALLEST_SHARE * len(use.load))
