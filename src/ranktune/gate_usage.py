"""`GateUsage`: how much each expert of one router is used, summed on the device and read when somebody asks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ExpertUse:
    """What one router did over some tokens.

    Attributes:
        load: the mean gate of each expert; they sum to one.
        chosen: the share of tokens in which each expert's gate is the largest.
        entropy: the mean over tokens of the gates' entropy, 1 where all gates are equal and 0 where one is all.
        tokens: how many. A layer that gradient checkpointing runs twice counts its tokens twice.
    """

    load: list[float]
    chosen: list[float]
    entropy: float
    tokens: int

    @property
    def effective_experts(self) -> float:
        """``exp(H(load))``: N where all experts carry the same load, 1 where one carries it all."""
        return math.exp(-sum(share * math.log(share) for share in self.load if share > 0.0))


class GateUsage:
    """Sums over tokens. Adding costs a few small operations and never waits for the device.

    Args:
        training: whether the tokens that count are those of training, or of evaluation.
    """

    def __init__(self, training: bool) -> None:
        self.training = training
        self._sums: Tensor | None = None
        self._tokens = 0

    @torch.no_grad()
    def add(self, gates: Tensor) -> None:
        """Note the gates [n, N] of n tokens."""
        experts = gates.shape[1]
        chosen = F.one_hot(gates.argmax(1), experts).sum(0)
        sums = torch.cat([gates.sum(0), chosen, torch.special.entr(gates).sum().view(1)]).float()
        if self._sums is None or self._sums.device != sums.device:
            self._sums = torch.zeros_like(sums)
            self._tokens = 0
        self._sums += sums
        self._tokens += gates.shape[0]

    def load(self) -> Tensor | None:
        """The mean gates [N] in float32, or None if there was no token."""
        if self._sums is None:
            return None
        return self._sums[: len(self._sums) // 2] / self._tokens

    def take(self) -> ExpertUse | None:
        """What was noted since the last time, or None if nothing was; waits for the device."""
        if self._sums is None:
            return None
        values = (self._sums / self._tokens).tolist()
        experts = len(values) // 2
        entropy = values[-1] / math.log(experts) if experts > 1 else 0.0
        use = ExpertUse(values[:experts], values[experts:-1], entropy, self._tokens)
        self._sums, self._tokens = None, 0
        return use
