"""`RankCallback`: the rank controller inside `transformers.Trainer` and everything built on it (TRL)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ranktune.controller import RankController, active_adapter, adapter_config


class RankCallback(TrainerCallback):
    """Moves ranks while a Trainer trains; it learns the run's length from the trainer.

    An adapter whose ranks are fixed (``lora``, ``dora``) needs nothing, and the callback then does nothing.

    Args:
        adapter_name: which adapter; the active one by default.
        penalty_in_loss: see `RankController`.

    Attributes:
        controller: the `RankController` of the latest training run, or None.
    """

    def __init__(self, adapter_name: str | None = None, *, penalty_in_loss: bool = False) -> None:
        self.adapter_name = adapter_name
        self.penalty_in_loss = penalty_in_loss
        self.controller: RankController | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Attach a controller to the trainer's optimizer."""
        if self.controller is not None:
            self.controller.close()
            self.controller = None
        adapter = self.adapter_name or active_adapter(model)
        if adapter_config(model, adapter).gated:
            self.controller = RankController(
                model, optimizer, state.max_steps, adapter_name=adapter, penalty_in_loss=self.penalty_in_loss
            )

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the total rank and the budget to what the trainer logs about a training step."""
        if self.controller is not None and logs is not None and "loss" in logs:
            added = {"total_rank": self.controller.total_rank(), "rank_budget": self.controller.budget()}
            logs.update(added)
            if state.log_history:
                state.log_history[-1].update(added)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Detach, and raise if no step ever reached the controller."""
        if self.controller is not None:
            self.controller.finish()
