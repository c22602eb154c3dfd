"""Full fine-tuning: every weight of the model is trained, and there is no adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ranktune.baselines.base import Baseline, register_baseline
from ranktune.baselines.callback import FixedRanks


@register_baseline
@dataclass
class Full(Baseline):
    """Train the whole model. Its run directory holds the model itself in `adapter/`."""

    method_name: ClassVar[str] = "full"

    def put_on(self, base: nn.Module) -> nn.Module:
        """The base model itself."""
        return base.requires_grad_(True)

    def callback(self) -> FixedRanks:
        """There are no ranks."""
        return FixedRanks()
