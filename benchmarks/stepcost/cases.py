"""One case of the comparison at a time: every variant on one batch shape and rank, or on one dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BertForSequenceClassification

from .machine import Machine
from .models import BLOCK_TARGETS, ENCODER_TARGETS, LlamaBlock, adapt
from .saved_bytes import SavedBytes, saved_bytes
from .timing import Spread, StepTime, TrainingStep, interleave, ratios
from .variants import FROZEN, REFERENCE, VARIANTS, Variant


@dataclass(frozen=True)
class TimeRow:
    """One variant's time in one case: seconds, and ratios in the same round.

    ``stock_to_step`` says how many times faster it is than PEFT's own adapter of the kind, where both were timed.
    """

    variant: str
    batch: int
    tokens: int
    r: int
    step: Spread
    forward_backward: Spread
    step_to_frozen: Spread
    step_to_reference: Spread
    forward_backward_to_reference: Spread
    stock_to_step: Spread | None


@dataclass(frozen=True)
class BytesRow:
    """One variant's bytes kept for backward on the Llama block."""

    variant: str
    width: int
    r: int
    dropout: float
    saved: SavedBytes
    per_token_to_reference: float


def time_case(
    base: BertForSequenceClassification,
    variants: Sequence[Variant],
    shape: tuple[int, int],
    r: int,
    dropout: float,
    machine: Machine,
    *,
    rounds: int,
    warmup: int,
    compiled: bool = False,
    each_round: Callable[[], object] = lambda: None,
) -> list[TimeRow]:
    """Time all variants of an encoder, interleaved.

    Args:
        base: from `models.encoder`. variants: `FROZEN` and `REFERENCE` among them.
        shape: sequences, and tokens of each.
    """
    batch = encoder_batch(base, shape, machine)
    steps = {
        variant.name: TrainingStep(
            adapt(base, variant, r, dropout, ENCODER_TARGETS, base.classifier), variant, batch, machine, compiled
        )
        for variant in variants
    }
    times = interleave(steps, rounds, warmup, each_round)
    return [_time_row(name, shape, r, times) for name in times]


def encoder_batch(base: BertForSequenceClassification, shape: tuple[int, int], machine: Machine) -> dict[str, Tensor]:
    """Random embeddings [batch, tokens, width] that get a gradient, and labels.

    The gradient makes backward go through every layer in every variant, the frozen model included.
    """
    size = (*shape, base.config.hidden_size)
    embeddings = torch.randn(size, dtype=machine.dtype, device=machine.device, requires_grad=True)
    return {"inputs_embeds": embeddings, "labels": torch.zeros(shape[0], dtype=torch.long, device=machine.device)}


def _time_row(name: str, shape: tuple[int, int], r: int, times: dict[str, list[StepTime]]) -> TimeRow:
    steps = {variant: [taken.step for taken in taken_times] for variant, taken_times in times.items()}
    passes = {variant: [taken.forward_backward for taken in taken_times] for variant, taken_times in times.items()}
    stock = steps.get(VARIANTS[name].stock or "")
    return TimeRow(
        variant=name,
        batch=shape[0],
        tokens=shape[1],
        r=r,
        step=Spread.of(steps[name]),
        forward_backward=Spread.of(passes[name]),
        step_to_frozen=ratios(steps[name], steps[FROZEN]),
        step_to_reference=ratios(steps[name], steps[REFERENCE]),
        forward_backward_to_reference=ratios(passes[name], passes[REFERENCE]),
        stock_to_step=None if stock is None else ratios(stock, steps[name]),
    )


def bytes_case(
    block: LlamaBlock, variants: Sequence[Variant], r: int, dropout: float, tokens: int, machine: Machine
) -> list[BytesRow]:
    """Count what every variant of a Llama block keeps for backward; `REFERENCE` is among them."""
    saved = {
        variant.name: saved_bytes(adapt(block, variant, r, dropout, BLOCK_TARGETS), block.width, tokens, machine)
        for variant in variants
    }
    reference = saved[REFERENCE].per_token
    return [
        BytesRow(name, block.width, r, dropout, count, count.per_token / reference) for name, count in saved.items()
    ]
