"""How a choice of components is carried out on the adapter and in the optimizer: `Pruning`, `Growth` and `Nesting`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ranktune.growing import GrowingUpdate
from ranktune.lowrank import Span
from ranktune.nested import Draw, NestedUpdate
from ranktune.optimizer_state import forget_components, warn_if_unknown
from ranktune.policy import GrowthPolicy, NestedPolicy, RankPolicy
from ranktune.restart_warmup import RestartWarmup
from ranktune.standstill import Standstill
from ranktune.update import LowRankUpdate


class Moves(ABC):
    """What happens to the components of an adapter; steps are optimizer steps, counted from 0."""

    @abstractmethod
    def apply(self, active: Tensor, step: int, final: bool) -> None:
        """Make exactly the components ``active`` [M, R] the active ones; for good if ``final``."""

    @abstractmethod
    def before_step(self, step: int, final: bool) -> None:
        """Called before every step of the optimizer, after any choice that is made there."""

    @abstractmethod
    def after_step(self, step: int, final: bool) -> None:
        """Called after every step of the optimizer, before any choice that is made there."""

    def release(self) -> None:  # noqa: B027  (most have nothing to take back)
        """Called when the controller lets go of the adapter."""

    def drawn(self, steps: int) -> dict[int, int]:  # noqa: ARG002
        """How often each rank was drawn in so many steps, ranks ascending; empty where nothing is drawn."""
        return {}


def moves_for(
    policy: RankPolicy, optimizer: Optimizer, updates: Sequence[LowRankUpdate], total_steps: int, seed: int
) -> Moves:
    """How this policy's choices are carried out."""
    if isinstance(policy, NestedPolicy):
        return Nesting(policy, optimizer, cast(Sequence[NestedUpdate], updates), seed)
    if isinstance(policy, GrowthPolicy):
        return Growth(policy, optimizer, cast(Sequence[GrowingUpdate], updates), total_steps)
    return Pruning(optimizer, updates)


class Pruning(Moves):
    """Inactive components have a gate of zero; once that is final, no moments either, and it is kept so."""

    def __init__(self, optimizer: Optimizer, updates: Sequence[LowRankUpdate]) -> None:
        self.optimizer = optimizer
        self.updates = updates

    def apply(self, active: Tensor, step: int, final: bool) -> None:  # noqa: ARG002
        for update, row in zip(self.updates, active, strict=True):
            cast(Tensor, update.rank_active).copy_(row)
        self._zero_inactive()
        if final:
            warn_if_unknown(self.optimizer)
            for update, row in zip(self.updates, active, strict=True):
                forget_components(self.optimizer, update, (~row).nonzero().squeeze(1))

    def before_step(self, step: int, final: bool) -> None:
        pass

    def after_step(self, step: int, final: bool) -> None:  # noqa: ARG002
        if final:
            self._zero_inactive()

    def _zero_inactive(self) -> None:
        with torch.no_grad():
            for update in self.updates:
                update.required_gate().masked_fill_(~cast(Tensor, update.rank_active), 0.0)


class Growth(Moves):
    """Active components are joined by those of the reserve, and the reserve is filled up again until growth has ended.

    The reserve is made after the first backward, so it is first trained in the second step. Components that come late
    are warmed up; those that are not trained never move.
    """

    def __init__(
        self, policy: GrowthPolicy, optimizer: Optimizer, updates: Sequence[GrowingUpdate], total_steps: int
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.updates = updates
        self._warmup = RestartWarmup(optimizer, updates, policy.ramp, total_steps)

    def apply(self, active: Tensor, step: int, final: bool) -> None:
        for update, rank in zip(self.updates, active.sum(1).tolist(), strict=True):
            if rank > update.rank_now:
                update.promote(rank - update.rank_now, step, keep_output=self.policy.keep_output)
            if final:
                forget_components(self.optimizer, update, update.dissolve_reserve())
        if not final:
            self._stock(step)

    def before_step(self, step: int, final: bool) -> None:
        if step == 0 and not final:
            self._stock(step)
        self._warmup.remember(step, final)

    def after_step(self, step: int, final: bool) -> None:  # noqa: ARG002
        self._warmup.correct(step)

    def _stock(self, step: int) -> None:
        """Fill up every reserve. Inert components had no gradient: an optimizer has nothing to forget of them."""
        for update in self.updates:
            missing = self.policy.reserve(update.rank_now) - (update.window - update.rank_now)
            if missing > 0:
                update.stock(missing, step, self.policy.reserve_gate)


@dataclass(frozen=True)
class _Lottery:
    """From optimizer steps done to what the next one trains, in modules of one capacity."""

    policy: NestedPolicy
    seed: int
    capacity: int

    def __call__(self, step: int) -> Span:
        return self.policy.span(self.policy.draw(self.seed, step), self.capacity)


class Nesting(Moves):
    """Every optimizer step trains a drawn rank, the same in all modules; no component is ever added or dropped.

    What is drawn depends on seed and step alone, so that the processes of a run agree, and a resumed run goes on as it
    would have. It stays as it is through all micro-batches of a step, and when checkpointing runs forward again.
    """

    def __init__(self, policy: NestedPolicy, optimizer: Optimizer, updates: Sequence[NestedUpdate], seed: int) -> None:
        self.policy = policy
        self.updates = updates
        self.seed = seed
        self._draws: dict[tuple[int, torch.device], Draw] = {}
        for update in updates:
            key = (update.capacity, update.lora_A.device)
            if key not in self._draws:
                self._draws[key] = Draw(_Lottery(policy, seed, update.capacity), update.lora_A.device)
            update.follow(self._draws[key])
        self._still = Standstill(optimizer, updates) if policy.strict else None

    def apply(self, active: Tensor, step: int, final: bool) -> None:
        pass

    def before_step(self, step: int, final: bool) -> None:  # noqa: ARG002
        if self._still is not None:
            self._still.remember()

    def after_step(self, step: int, final: bool) -> None:  # noqa: ARG002
        if self._still is not None:
            self._still.put_back()
        for draw in self._draws.values():
            draw.at(step + 1)

    def release(self) -> None:
        for update in self.updates:
            update.follow(None)

    def drawn(self, steps: int) -> dict[int, int]:
        return dict(sorted(Counter(self.policy.draw(self.seed, step) for step in range(steps)).items()))
