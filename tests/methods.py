"""The shared table: one row per method. A new method adds a row and inherits every test of test_conformance.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ranktune import DoraConfig, DyLoraConfig, DynamicDoraConfig, IncreLoraConfig, MorConfig, RankConfig


@dataclass(frozen=True)
class Row:
    """A method under test: how to build its config, and how it differs from the others where it has to.

    Attributes:
        mergeable: whether a weight can hold the update; where not, every way to merge has to be refused.
        undecayed: the names of the tensors that weight decay leaves alone besides vectors.
    """

    name: str
    config_class: type[RankConfig]
    fields: dict[str, Any] = field(default_factory=dict)
    mergeable: bool = True
    undecayed: tuple[str, ...] = ()

    def config(self, **fields: Any) -> RankConfig:
        return self.config_class(**{"r": 4, "lora_alpha": 6, **self.fields, **fields})

    def __str__(self) -> str:
        return self.name


_SCALINGS = ("expert_A", "expert_B", "router", "router_bias")

ROWS = [
    Row("lora", RankConfig),
    Row("lora-rslora", RankConfig, {"use_rslora": True}),
    Row("dora", DoraConfig),
    Row("dora-exact", DoraConfig, {"detach_norm": False}),
    Row("dora-low-rank-path", DoraConfig, {"dora_dropout": "low_rank_path"}),
    Row("dynamic-dora", DynamicDoraConfig),
    Row("dynamic-dora-decomposed", DynamicDoraConfig, {"use_dora": True}),
    Row("increlora", IncreLoraConfig, {"init_r": 2}),
    Row("increlora-decomposed", IncreLoraConfig, {"use_dora": True, "use_rslora": True}),
    Row("mor", MorConfig, {"num_experts": 3}, mergeable=False, undecayed=_SCALINGS),
    Row("mor-balanced", MorConfig, {"router": "balanced", "use_rslora": True}, mergeable=False, undecayed=_SCALINGS),
    Row("mor-bias", MorConfig, {"router_bias": True}, mergeable=False, undecayed=_SCALINGS),
    Row("mor-uniform", MorConfig, {"router": "uniform"}, undecayed=_SCALINGS),
    Row("dylora", DyLoraConfig),
    Row("dylora-decomposed", DyLoraConfig, {"use_dora": True, "use_rslora": True}),
]


class Linears(nn.Module):
    """Square, widening, narrowing and bias-free linear layers, with something nonlinear between them."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(12, 12)
        self.wide = nn.Linear(12, 20, bias=False)
        self.narrow = nn.Linear(20, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.narrow(torch.tanh(self.wide(torch.tanh(self.square(x)))))))


class Conv1Ds(nn.Module):
    """GPT-2's transposed linear layers, square and not."""

    def __init__(self) -> None:
        super().__init__()
        self.square = Conv1D(12, 12)
        self.wide = Conv1D(20, 12)
        self.narrow = Conv1D(7, 20)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.narrow(torch.tanh(self.wide(torch.tanh(self.square(x)))))))


TARGETS = ["square", "wide", "narrow"]
BASES: dict[str, Callable[[], nn.Module]] = {"Linear": Linears, "Conv1D": Conv1Ds}


def build_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base model whose weights are large enough for an adapter's effect to show; always the same."""
    torch.manual_seed(0)
    model = BASES[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """[2, 5, 12]: a batch of sequences."""
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def perturb(model: nn.Module, scale: float = 0.3, seed: int = 2) -> nn.Module:
    """Move every adapter tensor away from its start, as training would; magnitudes by a share of themselves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranktune_" in name:
                noise = scale * torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_((1 + noise).to(parameter.dtype))
                else:
                    parameter.add_(noise.to(parameter.dtype))
    return model
