"""What a controller takes of one training step, timed apart from the rest of it, on any number of modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepcost.machine import Machine
from stepcost.models import adapt
from stepcost.timing import Spread, interleave
from stepcost.variants import VARIANTS, Variant

from .axes import Setting

# Those whose ranks move; PEFT's own allocator beside ours.
CONTROLLED = [VARIANTS[name] for name in ("peft-adalora", "dynamic-dora", "increlora", "increlora-scored", "dylora")]


class Stack(nn.Module):
    """Linear layers of one width, one after the other, that share one frozen weight: the identity.

    So any number of them fits into memory, and nothing grows or shrinks on its way through.
    """

    def __init__(self, width: int, modules: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential() for _ in range(modules))
        weight = nn.Parameter(torch.eye(width))
        for block in self.blocks:
            linear = nn.Linear(width, width, bias=False, device="meta")
            linear.weight = weight
            block.add_module("linear", linear)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class HookTime:
    """Seconds of one step: what moves the ranks, before and after the optimizer, and the optimizer's own step."""

    controller: float
    optimizer: float


@dataclass(frozen=True)
class HookRow:
    """One variant's seconds at one number of modules."""

    variant: str
    controller: Spread
    optimizer: Spread


class HookedStep:
    """A training step in which the clock is read before and after the controller's hooks.

    Its scoring inside backward (``increlora-scored``) is no part of this: see the step's time on the other axes.
    """

    def __init__(self, model: nn.Module, variant: Variant, x: Tensor, machine: Machine) -> None:
        self.model, self.x, self.machine = model, x, machine
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.steps = 0
        self._times: list[float] = []
        # Hooks are called in the order in which they were registered.
        self.optimizer.register_step_pre_hook(self._note)
        self.optimizer.register_step_post_hook(self._note)
        self.after_step = variant.attach(model, self.optimizer)
        self.optimizer.register_step_pre_hook(self._note)

    def _note(self, *_: object) -> None:
        self._times.append(self.machine.now())

    def __call__(self) -> HookTime:
        """Do one step and time what stands around the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        with self.machine.autocast():
            loss = self.model(self.x).square().mean()
        loss.backward()
        self._times.clear()
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step(self.steps)
        self._note()
        before, ready, stepped, done = self._times
        return HookTime(ready - before + done - stepped, stepped - ready)


def hook_case(
    variants: Sequence[Variant], setting: Setting, machine: Machine, *, rounds: int, warmup: int
) -> list[HookRow]:
    """Time all variants, interleaved."""
    base = Stack(setting.width, setting.modules).to(machine.device, machine.dtype)
    x = torch.randn(setting.tokens * setting.sequences, setting.width, dtype=machine.dtype, device=machine.device)
    steps = {
        variant.name: HookedStep(adapt(base, variant, setting.r, 0.0, ["linear"]), variant, x, machine)
        for variant in variants
    }
    return [
        HookRow(
            name,
            Spread.of([time.controller for time in taken]),
            Spread.of([time.optimizer for time in taken]),
        )
        for name, taken in interleave(steps, rounds, warmup).items()
    ]
