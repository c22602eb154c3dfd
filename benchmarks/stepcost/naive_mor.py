"""MoR as its formula reads, from stock operators: every expert's output side by side, as `ranktune.mixture` is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ranktune import MorConfig
from ranktune.routed import RoutedUpdate
from ranktune.update import Base


class NaiveUpdate(RoutedUpdate):
    """``W x + s sum_i G_i b_i o (B (a_i o A x))`` with intermediates [tokens, N, out]."""

    def forward(self, x: Tensor, base: Base, scale: float) -> Tensor:
        """The adapted layer's output [..., out] for x [..., in]."""
        h = F.linear(F.dropout(x, self.dropout if self.training else 0.0), self.lora_A)
        experts = F.linear(h.unsqueeze(-2) * self.expert_A, self.lora_B)
        mixed = torch.einsum("...n,...no,no->...o", self.gates(x), experts, self.expert_B)
        return F.linear(x, base.weight, base.bias) + scale * mixed


@dataclass
class NaiveMorConfig(MorConfig):
    """`MorConfig` with the naive update; the same parameters and the same function."""

    def make_update(self, in_features: int, out_features: int, capacity: int) -> RoutedUpdate:
        """The tensors for one module, without values."""
        update = super().make_update(in_features, out_features, capacity)
        update.__class__ = NaiveUpdate
        return update
