"""Timing training steps of several variants against one another, interleaved so that machine drift cancels."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .machine import Machine
from .variants import Variant

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step: forward and backward alone, and with the optimizer and what follows it."""

    forward_backward: float
    step: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class TrainingStep:
    """One variant's training step, callable any number of times.

    Args:
        model: the adapted model; its output has a ``loss``.
        variant: says what to call after the optimizer.
        batch: the model's keyword arguments, the same in every step.
        machine: clock and precision.
        compiled: whether the model goes through ``torch.compile``.
    """

    def __init__(
        self, model: nn.Module, variant: Variant, batch: Mapping[str, Tensor], machine: Machine, compiled: bool = False
    ) -> None:
        self.batch, self.machine = batch, machine
        # Trainer's own choice of optimizer and of weight decay.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.after_step = variant.attach(model, self.optimizer)
        self.model = torch.compile(model) if compiled else model
        self.steps = 0

    def __call__(self) -> StepTime:
        """Do one step and time it."""
        self.optimizer.zero_grad(set_to_none=True)
        for value in self.batch.values():
            value.grad = None
        self.steps += 1
        start = self.machine.now()
        with self.machine.autocast():
            loss = self.model(**self.batch).loss
        loss.backward()
        middle = self.machine.now()
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step(self.steps)
        return StepTime(middle - start, self.machine.now() - start)


def interleave(
    steps: Mapping[str, Callable[[], Taken]],
    rounds: int,
    warmup: int,
    each_round: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> dict[str, list[Taken]]:
    """Time every variant once a round, in an order shuffled anew each round so that none always follows the same one.

    Args:
        steps: name to one training step, which returns what it took.
        rounds: rounds that count. warmup: rounds before them, discarded.
        each_round: called after every round, for a progress bar.
        seed: of the shuffle.
    """
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[Taken]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        shuffle(order)
        for name in order:
            taken = steps[name]()
            if number >= warmup:
                times[name].append(taken)
        each_round()
    return times


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of value / reference, each against the reference's time in the same round."""
    return Spread.of([value / other for value, other in zip(values, reference, strict=True)])
