"""The learning rate of components that were added late, relative to that of the optimizer group they live in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where a group keeps its previous learning-rate share. It is saved with the optimizer, so that resuming is bitwise.
_PREVIOUS = "ranktune_lr_share"
# How near to a whole number the remaining steps of a linear decay are, and by how many of them a scheduler may be ahead
# of the optimizer, having counted steps that a loss scaler skipped.
_WHOLE = 1e-4
_AHEAD = 32


@dataclass(frozen=True)
class RowRates:
    """Learning rates of rows relative to their group's.

    Attributes:
        share: the group's rate as a share of its initial one. linear: whether it follows a linear warm-up and decay.
        step: t, counted from 0. total_steps, ramp: see `RestartWarmup`.
    """

    share: float
    linear: bool
    step: int
    total_steps: int
    ramp: int

    @classmethod
    def of(cls, group: dict[str, Any], step: int, ramp: int, total_steps: int) -> RowRates:
        """Read the group's schedule off its present and previous learning rate, and note the present one."""
        initial = float(group.get("initial_lr", group["lr"]))
        share = float(group["lr"]) / initial if initial else 0.0
        previous = group.get(_PREVIOUS)
        group[_PREVIOUS] = share
        linear = previous is not None and _is_linear(previous, share, total_steps - step)
        return cls(share, linear, step, total_steps, ramp)

    def of_rows(self, ages: Tensor) -> Tensor:
        """rho for rows of these ages [n].

        Under a linear schedule a row ramps up over w steps and then decays to zero at the end of the run,
        lambda(s) = s / w, then (N' - s) / (N' - w) with N' the steps that remained at its birth, whatever the group's
        own rate is by then. Under any other it ramps up to the group's rate.
        """
        s = ages - 1.0
        if self.ramp == 0:
            return torch.ones_like(s)
        if not self.linear:
            return (s / self.ramp).clamp(max=1.0)
        if self.share == 0.0:
            return torch.zeros_like(s)
        remained = self.total_steps - (self.step - ages + 1.0)
        falling = ((remained - s) / (remained - self.ramp).clamp(min=1.0)).clamp(min=0.0)
        return torch.where(s < self.ramp, s / self.ramp, falling) / self.share


def _is_linear(previous: float, now: float, left: int) -> bool:
    """Whether two successive rates belong to a linear schedule: rising, or falling to zero in ``left`` steps or a few
    less."""
    if now >= previous:
        return now > previous
    remaining = now / (previous - now)
    whole = round(remaining)
    return abs(remaining - whole) < _WHOLE and max(left / 2, left - _AHEAD) <= whole <= left
