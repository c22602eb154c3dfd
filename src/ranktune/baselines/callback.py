"""Callbacks in the place of `RankCallback` for methods that are not ours: fixed ranks, and AdaLoRA's allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from peft.tuners.adalora import AdaLoraConfig, AdaLoraModel
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ranktune.baselines.reading import ranks
from ranktune.history import RankChange
from ranktune.integrations.trainer import RankCallback


class FixedRanks(RankCallback):
    """There is nothing to move, and no adapter of ours to attach to."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Any model is within its budget from the start."""
        self._within_budget = self.final


class AdaLoraAllocation(FixedRanks):
    """Calls stock AdaLoRA's allocator once in every optimizer step, which Trainer never does.

    Its place is between the optimizer's step and `zero_grad`, where the gradients of all micro-batches are still there.
    Steps are counted from 1, so that the step of the final allocation exists with every `tfinal`; a step that an AMP
    scaler skipped is not counted as seen, and a final allocation that falls on one is made up for.

    Args:
        stages: gives `total_step`, `tinit`, `tfinal` and `deltaT` for a number of optimizer steps.
    """

    def __init__(self, stages: Callable[[int], dict[str, int]]) -> None:
        super().__init__()
        self._stages = stages
        self._changes: list[RankChange] = []
        self._ranks: dict[str, int] = {}
        self._allocated = False

    @property
    def final(self) -> bool:
        """Whether the final allocation has been made."""
        return self._allocated

    @property
    def history(self) -> list[RankChange]:
        """Every change of a module's rank so far; AdaLoRA gives modules no score."""
        return self._changes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the allocator how long the run is."""
        model = kwargs["model"]
        for name, value in self._stages(state.max_steps).items():
            setattr(_allocator(model).rankallocator.peft_config, name, value)
        self._ranks = ranks(model)
        super().on_train_begin(args, state, control, **kwargs)

    def on_optimizer_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Score, and where it is due allocate."""
        if getattr(optimizer, "step_was_skipped", False):
            return
        allocator = _allocator(model)
        schedule = cast(AdaLoraConfig, allocator.rankallocator.peft_config)
        step, last = state.global_step + 1, state.max_steps - schedule.tfinal
        if not self._allocated and step >= last:
            step, self._allocated = last, True
        allocator.update_and_allocate(step)
        now = ranks(model)
        self._changes += [
            RankChange(state.global_step + 1, name, self._ranks[name], rank, None)
            for name, rank in now.items()
            if rank != self._ranks[name]
        ]
        self._ranks = now

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the total rank and the budget, as `RankCallback` does."""
        if logs is not None and "loss" in logs:
            budget, _ = _allocator(kwargs["model"]).rankallocator.budget_schedule(state.global_step)
            logs.update(total_rank=sum(self._ranks.values()), rank_budget=budget)


def _allocator(model: nn.Module) -> AdaLoraModel:
    return next(module for module in model.modules() if isinstance(module, AdaLoraModel))
