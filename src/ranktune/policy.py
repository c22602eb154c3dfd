"""What decides about ranks: a `RankPolicy` turns a `RankState` and a measurement into the next state.

Policies are pure: they are given tensors and return tensors, and never touch a model or an optimizer. The controller
reads the state from the adapter's buffers, asks the policy, and carries its decisions out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ranktune.update import LowRankUpdate


@dataclass(frozen=True)
class Layout:
    """What is fixed about an adapter of M modules.

    Attributes:
        modules: their names in model order.
        costs: [M] int64, the parameters of one component of each module: in + out + its gate.
    """

    modules: tuple[str, ...]
    costs: Tensor


@dataclass(frozen=True)
class RankState:
    """All that a policy remembers, with the M modules of R components each stacked in layout order.

    Attributes:
        step: optimizer steps done.
        active: [M, R] bool, the components that count as the module's rank.
        average: [M, R], the policy's running average of what it measures.
    """

    step: int
    active: Tensor
    average: Tensor


class RankPolicy(ABC):
    """A method's rule for moving ranks over a run of known length."""

    @abstractmethod
    def measures(self, step: int) -> bool:
        """Whether something is measured after this step."""

    @abstractmethod
    def measure(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """Score every component [M, R] from the adapter's tensors as they are."""

    @abstractmethod
    def observe(self, state: RankState, measured: Tensor) -> RankState:
        """Take a measurement into the running average."""

    @abstractmethod
    def decide(self, state: RankState) -> Tensor | None:
        """The components to be active from now on [M, R] bool, or None when nothing is to be decided at this step."""

    @abstractmethod
    def is_final(self, step: int) -> bool:
        """Whether ranks can no longer change: inactive components then stay at zero for good."""

    @abstractmethod
    def budget(self, step: int) -> int:
        """What the active components may cost after this step, in ranks or in parameters."""

    @abstractmethod
    def penalises(self, step: int) -> bool:
        """Whether a regulariser acts on this step's gradients."""

    @abstractmethod
    def penalty(self, updates: Sequence[LowRankUpdate]) -> Tensor:
        """The regulariser as a scalar, differentiable in the adapter's tensors."""

    @abstractmethod
    def penalty_gradients(self, updates: Sequence[LowRankUpdate]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a parameter and the regulariser's gradient for it, in closed form."""
