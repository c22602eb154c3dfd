"""What is on record of a run whose ranks move: every change, and where the schedule was begun anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor

from ranktune.update import LowRankUpdate


@dataclass(frozen=True)
class RankChange:
    """One module's rank, changed.

    Attributes:
        step: optimizer steps done when it changed.
        module: its name in the unwrapped model.
        old, new: rank before and after.
        score: what the policy thought of the module then; None where none of its components is left.
    """

    step: int
    module: str
    old: int
    new: int
    score: float | None


@dataclass(frozen=True)
class Restart:
    """Where a rank schedule was begun anew in the middle of a run.

    Attributes:
        step: optimizer steps done then.
        ranks: the modules' ranks then, in model order.
    """

    step: int
    ranks: tuple[int, ...]

    @classmethod
    def here(cls, updates: Sequence[LowRankUpdate]) -> Restart:
        """At the step, and with the ranks, that an adapter has now."""
        return cls(int(cast(Tensor, updates[0].rank_step)), tuple(update.rank for update in updates))


def history_records(history: Sequence[RankChange]) -> list[dict[str, Any]]:
    """The history as plain data, for ``ranks.json``."""
    return [asdict(change) for change in history]
