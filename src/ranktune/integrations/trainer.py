"""`RankCallback`: the rank controller inside `transformers.Trainer` and everything built on it (TRL)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ranktune.attachment import active_adapter, adapter_config
from ranktune.controller import RankChange, RankController


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
        self._within_budget = False

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
        self._within_budget = self.final

    @property
    def final(self) -> bool:
        """Whether ranks no longer move: always so where they are fixed."""
        return self.controller is None or self.controller.ended

    @property
    def history(self) -> list[RankChange]:
        """Every change of a module's rank so far."""
        return [] if self.controller is None else self.controller.history

    def put_first(self, trainer: Trainer) -> None:
        """Move this callback before the trainer's own, so that its trackers get the rank and the budget too."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Let only models within the budget compete for the best checkpoint."""
        if not self._within_budget:
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None
            self._within_budget = self.final

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


class RankEarlyStoppingCallback(EarlyStoppingCallback):
    """Transformers' early stopping, held back until ranks no longer move.

    Stopping earlier would leave an adapter above its budget.

    Args:
        ranks: the trainer's `RankCallback`.
        patience: evaluations without improvement before training stops.
    """

    def __init__(self, ranks: RankCallback, patience: int) -> None:
        super().__init__(early_stopping_patience=patience)
        self.ranks = ranks

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Count evaluations once the ranks are final."""
        if self.ranks.final:
            super().on_evaluate(args, state, control, metrics, **kwargs)
