"""What decides about ranks: a `RankPolicy` turns a `RankState` and a measurement into the next state.

Policies are pure: they are given tensors and return tensors, and never touch a model or an optimizer. The controller
reads the state from the adapter's buffers, asks the policy, and carries its decisions out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ranktune.lowrank import Span
from ranktune.update import LowRankUpdate


@dataclass(frozen=True)
class Layout:
    """What is fixed about an adapter of M modules.

    Attributes:
        modules: their names in model order.
        costs: [M] int64, the parameters of one component of each module: in + out + its gate.
        ranks: the modules' ranks where the schedule begins; None is where the method starts.
    """

    modules: tuple[str, ...]
    costs: Tensor
    ranks: tuple[int, ...] | None = None

    def ranks_from(self, start_rank: int) -> Tensor:
        """The modules' ranks [M] int64 where the schedule begins, for a method that starts at ``start_rank``."""
        return torch.tensor(self.ranks or [start_rank] * len(self.modules))


@dataclass(frozen=True)
class RankState:
    """All that a policy remembers, with the M modules of R components each stacked in layout order.

    Attributes:
        step: optimizer steps done since the schedule began.
        active: [M, R] bool, the components that count as the module's rank.
        average: [M, R], or [M, K] with K of the policy's choice, the running averages of what it measures.
    """

    step: int
    active: Tensor
    average: Tensor


class RankPolicy(ABC):
    """A method's rule for moving ranks over a run of known length."""

    # Whether it measures gradients, and so acts between backward and the optimizer's step, when ``step`` optimizer
    # steps are done before it. Otherwise it acts after the step and looks at the adapter's tensors.
    before_step: ClassVar[bool] = False

    @abstractmethod
    def measures(self, step: int) -> bool:
        """Whether something is measured, and perhaps decided, when ``step`` optimizer steps are done."""

    @abstractmethod
    def measure(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """Score every component [M, R], or every module [M], from the adapter's tensors as they are."""

    @abstractmethod
    def observe(self, state: RankState, measured: Tensor) -> RankState:
        """Take a measurement into the running averages."""

    @abstractmethod
    def decide(self, state: RankState) -> Tensor | None:
        """The components to be active from now on [M, R] bool, or None when nothing is to be decided at this step."""

    @abstractmethod
    def importance(self, state: RankState) -> Tensor:
        """The scores that decisions go by, for the record: of every component [M, R], or of every module [M, 1]."""

    @abstractmethod
    def has_ended(self, step: int, ranks: Sequence[int]) -> bool:
        """Whether ranks can no longer change, with so many steps done and modules of those ranks."""

    @abstractmethod
    def budget(self, step: int) -> int:
        """What the active components may cost when ``step`` steps are done, in ranks or in parameters."""

    @abstractmethod
    def penalises(self, step: int) -> bool:
        """Whether a regulariser acts on this step's gradients."""

    @abstractmethod
    def penalty(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """The regulariser as a scalar, differentiable in the adapter's tensors."""

    @abstractmethod
    def add_penalty_gradients(self, updates: Sequence[LowRankUpdate], scale: Tensor | float = 1.0) -> None:
        """Add the regulariser's gradient, in closed form and times ``scale``, to those that parameters have."""


class GrowthPolicy(RankPolicy):
    """A policy that adds components, out of a reserve that is kept beside the active ones.

    Attributes:
        reserve_gate: the constant gate of a component in reserve.
        ramp: steps over which a component that was added reaches the learning rate; 0 is at once.
        keep_output: whether growing a module leaves its output as it is, although the scale falls.
    """

    before_step: ClassVar[bool] = True
    reserve_gate: float
    ramp: int
    keep_output: bool

    @abstractmethod
    def reserve(self, rank: int) -> int:
        """How many components a module of that rank keeps in reserve."""


class NestedPolicy(RankPolicy):
    """A policy that draws a rank for every optimizer step, and moves none.

    What a policy that moves ranks does, this one does not: it measures, decides and penalises nothing.

    Attributes:
        strict: whether components that a step does not train must not move in it, nor what the optimizer keeps of them.
    """

    strict: bool

    @abstractmethod
    def draw(self, seed: int, step: int) -> int:
        """The rank b of the optimizer step that has ``step`` steps before it: a function of the arguments alone."""

    @abstractmethod
    def span(self, b: int, capacity: int) -> Span:
        """What takes part and what is trained at rank b, in a module of so many components."""

    def measures(self, step: int) -> bool:  # noqa: ARG002
        return False

    def measure(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        return torch.empty(len(updates), 0)

    def observe(self, state: RankState, measured: Tensor) -> RankState:  # noqa: ARG002
        return state

    def decide(self, state: RankState) -> Tensor | None:  # noqa: ARG002
        return None

    def importance(self, state: RankState) -> Tensor:
        return state.average

    def has_ended(self, step: int, ranks: Sequence[int]) -> bool:  # noqa: ARG002
        return True

    def penalises(self, step: int) -> bool:  # noqa: ARG002
        return False

    def penalty(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        return torch.zeros((), device=updates[0].lora_A.device)

    def add_penalty_gradients(self, updates: Sequence[LowRankUpdate], scale: Tensor | float = 1.0) -> None:
        pass
