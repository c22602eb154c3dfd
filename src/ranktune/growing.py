"""`GrowingUpdate`: an update whose components are added while it trains, inside a fixed capacity.

Its components are, in order: the active ones, which count as the rank; a reserve, which takes part in forward without
counting; and inert ones, which wait. The scale follows the active rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ranktune.lowrank import Components, Span
from ranktune.update import LowRankUpdate

# `rank_birth` of a component that was there from the start, or is not there yet.
UNBORN = -1


class GrowingUpdate(LowRankUpdate):
    """``s (start / rank)^p B diag(gate) A`` over the active components and the reserve.

    Args:
        in_features, out_features, capacity: see `LowRankUpdate`.
        start_rank: the components that are active at first, for which the scale is meant.
        scale_power: p, 1 or, with ``use_rslora``, 0.5.
        reserve_learns: whether the reserve's vectors are trained; its gates never are.
        options: of `LowRankUpdate`.

    Attributes:
        rank_birth: [2, R] int64, the optimizer step (counted from 0) at which each component's vectors, and its gate,
            were first there to be trained; `UNBORN` for those of the start and for inert ones. Saved with the weights.
        start_rank, rank_now, window: how many leading components are of the start, active, and active or in reserve.
            Plain numbers, so that eager mode slices without asking the device; a compiled graph sees masks.
    """

    rank_active: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]  (this kind always has one)
    rank_birth: Tensor

    _COMPONENT_DIM: ClassVar[dict[str, int]] = {**LowRankUpdate._COMPONENT_DIM, "rank_birth": 1}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        capacity: int,
        *,
        start_rank: int,
        scale_power: float,
        reserve_learns: bool,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, capacity, gated=True, **options)
        self.register_buffer("rank_birth", torch.full((2, capacity), UNBORN))
        self.rank_active[start_rank:] = False
        self.start_rank = start_rank
        self.scale_power = scale_power
        self.reserve_learns = reserve_learns
        self.rank_now = self._window = start_rank
        self._births = [[UNBORN] * capacity] * 2

    @property
    def rank(self) -> int:
        """The number of components in use, known without storage too."""
        return self.rank_now

    @property
    def window(self) -> int:
        """How many leading components are active or in reserve."""
        return self._window

    @property
    def trained(self) -> int:
        """How many leading components have vectors that are trained."""
        return self.window if self.reserve_learns else self.rank_now

    def factors(self, scale: float) -> tuple[Tensor, Tensor, float]:
        """See `LowRankUpdate.factors`."""
        if torch.compiler.is_compiling():
            gate = self.required_gate()
            present = self.rank_active | (self.rank_birth[0] > UNBORN)
            gate = torch.where(self.rank_active, gate, gate.detach()) * present
            follow = (self.start_rank / self.rank_active.sum()) ** self.scale_power
            return self.lora_A, self.lora_B * (gate * follow.to(gate.dtype)), scale
        added = self.components_now(scale)
        return (*added.plain(), added.scale)

    def components_now(self, scale: float) -> Components:
        """See `LowRankUpdate.components_now`: the active ones and the reserve, whose gates are constants."""
        if torch.compiler.is_compiling():
            return Components(*self.factors(scale))
        follow = (self.start_rank / self.rank_now) ** self.scale_power
        span = Span(0, self.window)
        return Components(self.lora_A, self.lora_B, scale * follow, self.gate, span, gates_trained=self.rank_now)

    def _components_that_count(self) -> Tensor:
        """The active ones: what waits in reserve is dropped."""
        return torch.arange(self.rank_now)

    def births(self) -> tuple[list[int], list[int]]:
        """When the trained components beyond those of the start were first there: their vectors, and their gates."""
        vectors, gates = self._births
        return vectors[self.start_rank : self.trained], gates[self.start_rank : self.rank_now]

    @torch.no_grad()
    def promote(self, count: int, step: int, *, keep_output: bool) -> None:
        """Make the first ``count`` components of the reserve active.

        Args:
            count: at most as many as the reserve has.
            step: the optimizer step, counted from 0, that has had its backward.
            keep_output: make up for the smaller scale in the gates, so that the output stays what it was.
        """
        old, new = self.rank_now, self.rank_now + count
        self.rank_active[old:new] = True
        self.rank_birth[1, old:new] = step
        if not self.reserve_learns:
            self.rank_birth[0, old:new] = step
        if keep_output:
            self.required_gate()[: self.window] *= (new / old) ** self.scale_power
        self.count()

    @torch.no_grad()
    def stock(self, count: int, step: int, gate: float) -> None:
        """Add ``count`` inert components to the reserve, with a gate of that value."""
        added = slice(self.window, self.window + count)
        self.rank_birth[0, added] = step
        self.required_gate()[added] = gate
        self.count()

    @torch.no_grad()
    def dissolve_reserve(self) -> Tensor:
        """Make the reserve inert; the indices of what was in it."""
        left = slice(self.rank_now, self.window)
        self.rank_birth[0, left] = UNBORN
        self.required_gate()[left] = 0.0
        self.count()
        return torch.arange(left.start, left.stop)

    def count(self) -> None:
        """Read the plain numbers from the buffers, after these were written."""
        if not self.rank_active.is_meta and not self.rank_birth.is_meta:
            self._births = self.rank_birth.tolist()
            self.rank_now = int(self.rank_active.sum())
            self._window = int((self.rank_active | (self.rank_birth[0] > UNBORN)).sum())

    def keep_components(self, kept: Tensor) -> None:
        """See `LowRankUpdate.keep_components`."""
        super().keep_components(kept)
        self.count()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.count()
