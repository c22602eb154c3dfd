"""Exact count of what training keeps besides the frozen weights, on the encoder whose steps are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from ranktune.nested import NestedUpdate
from stepcost.cases import encoder_batch
from stepcost.machine import Machine
from stepcost.models import ENCODER_TARGETS, adapt
from stepcost.saved_bytes import kept_for_backward
from stepcost.timing import TrainingStep
from stepcost.variants import REFERENCE, Variant

from .axes import Setting


@dataclass(frozen=True)
class MemoryRow:
    """One variant's bytes at one point.

    Attributes:
        kept: what backward needs of the whole batch; see `stepcost.saved_bytes`.
        trained: the trained parameters, head included, their gradients, and the optimizer's state of them.
        to_reference: kept and trained together, by those of PEFT LoRA. kept_to_reference: kept alone.
    """

    variant: str
    kept: int
    trained: int
    to_reference: float
    kept_to_reference: float


class _Loss(nn.Module):
    """The encoder as a function of its embeddings alone."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, labels=self.labels).loss


def memory_case(
    base: BertForSequenceClassification, variants: Sequence[Variant], setting: Setting, machine: Machine
) -> list[MemoryRow]:
    """Count for every variant, after one step; `REFERENCE` is among them. A nested adapter is at its largest rank."""
    counts = {variant.name: _count(base, variant, setting, machine) for variant in variants}
    kept, trained = counts[REFERENCE]
    return [MemoryRow(name, k, t, (k + t) / (kept + trained), k / kept) for name, (k, t) in counts.items()]


def _count(
    base: BertForSequenceClassification, variant: Variant, setting: Setting, machine: Machine
) -> tuple[int, int]:
    batch = encoder_batch(base, (setting.sequences, setting.tokens), machine)
    model = adapt(base, variant, setting.r, 0.0, ENCODER_TARGETS, base.classifier)
    step = TrainingStep(model, variant, batch, machine)
    step()
    trained = trained_bytes(step.optimizer)
    for module in model.modules():
        if isinstance(module, NestedUpdate):
            module.follow(None)
    return kept_for_backward(_Loss(model, batch["labels"]), batch["inputs_embeds"], machine), trained


def trained_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the parameters that an optimizer steps, their gradients, and what it remembers of them."""
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            remembered = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
            gradient = [] if parameter.grad is None else [parameter.grad]
            total += sum(tensor.nbytes for tensor in (parameter, *gradient, *remembered))
    return total
