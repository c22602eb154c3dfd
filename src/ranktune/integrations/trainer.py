"""`RankCallback`: the rank controller inside `transformers.Trainer` and everything built on it (TRL)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

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
from transformers.trainer_callback import ExportableState

from ranktune.attachment import active_adapter, adapter_config
from ranktune.controller import RankController
from ranktune.errors import ConfigError
from ranktune.history import RankChange, Restart, history_records
from ranktune.router_health import RouterHealth


@dataclass(frozen=True)
class RunShape:
    """What decides which examples a run sees at which of its optimizer steps.

    Attributes:
        total_steps: optimizer steps of the whole run. epochs: passes over the data, begun ones counted.
        world_size: processes. batch_size: examples of one process and backward. accumulation: backwards a step.
    """

    total_steps: int
    epochs: int
    world_size: int
    batch_size: int
    accumulation: int

    @classmethod
    def of(cls, args: TrainingArguments, total_steps: int, epochs: int) -> RunShape:
        """That of a run of so many steps and epochs."""
        return cls(total_steps, epochs, args.world_size, args.train_batch_size, args.gradient_accumulation_steps)

    def changes_from(self, recorded: dict[str, Any]) -> list[str]:
        """What is not as it was recorded (`dataclasses.asdict`), in words."""
        now = asdict(self)
        names = [name for name in now if name in recorded and recorded[name] != now[name]]
        return [f"{name.replace('_', ' ')} was {recorded[name]}, now {now[name]}" for name in names]


class RankCallback(TrainerCallback, ExportableState):
    """Moves ranks while a Trainer trains; it learns the run's length from the trainer.

    An adapter whose ranks are fixed (``lora``, ``dora``) needs nothing, and the callback then does nothing. With
    ``mor`` it logs how the routers do, and warns when one collapses.

    What it knows travels in the Trainer's checkpoints: after ``trainer.train(resume_from_checkpoint=...)`` the history
    is complete, and the run has to have the length it was planned for.

    Args:
        adapter_name: which adapter; the active one by default.
        penalty_in_loss: see `RankController`.
        replan: a resumed run may have another length, and its rank schedule begins anew: from the ranks of the
            checkpoint, over the steps that remain.

    Attributes:
        controller: the `RankController` of the latest training run, or None.
        routers: the `ranktune.router_health.RouterHealth` of the latest training run, or None.

    Raises:
        ConfigError: a resumed run has another number of steps, epochs or processes, or other batches, than the rank
            schedule was laid out for.
    """

    def __init__(self, adapter_name: str | None = None, *, penalty_in_loss: bool = False, replan: bool = False) -> None:
        self.adapter_name = adapter_name
        self.penalty_in_loss = penalty_in_loss
        self.replan = replan
        self.controller: RankController | None = None
        self.routers: RouterHealth | None = None
        self._within_budget = False
        self._shape: RunShape | None = None
        self._began = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint's ``trainer_state.json`` keeps of this callback, as transformers wants it."""
        record: dict[str, Any] = {"shape": asdict(self._shape) if self._shape else {}}
        if self.controller is not None:
            restart = self.controller.restart
            record |= {
                "history": history_records(self.controller.history),
                "skipped": self.controller.skipped,
                "within_budget": self._within_budget,
                "restart": asdict(restart) if restart else None,
            }
        options = {"adapter_name": self.adapter_name, "penalty_in_loss": self.penalty_in_loss, "replan": self.replan}
        return {"args": options, "attributes": {"record": record}}

    def on_train_begin(
        self,
        args: TrainingArguments,
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
        record = self._record_in(state)
        self._shape, self._began = RunShape.of(args, state.max_steps, state.num_train_epochs), state.global_step
        adapter = self.adapter_name or active_adapter(model)
        self.routers = RouterHealth(model, adapter)
        if adapter_config(model, adapter).needs_controller:
            self.controller = RankController(
                model,
                optimizer,
                state.max_steps,
                adapter_name=adapter,
                seed=args.seed,
                penalty_in_loss=self.penalty_in_loss,
                restart=self._restart(record, state),
            )
            self._refuse_another_shape(record, state)
            self.controller.recall(
                [RankChange(**change) for change in record.get("history", [])], record.get("skipped", 0)
            )
        self._within_budget = record.get("within_budget", self.final)
        # A checkpoint that was written without this callback has no place for its state.
        _saved_states(state).setdefault(type(self).__name__, self.state())

    def _record_in(self, state: TrainerState) -> dict[str, Any]:
        """What this callback left in the checkpoint that training goes on from, if it does."""
        saved = _saved_states(state).get(type(self).__name__, {}) if state.global_step > 0 else {}
        # Trainer keeps a list where there are several callbacks of a class, one for each adapter.
        own = [one for one in (saved if isinstance(saved, list) else [saved]) if one]
        records = [one["attributes"]["record"] for one in own if one["args"]["adapter_name"] == self.adapter_name]
        return records[-1] if records else {}

    def _restart(self, record: dict[str, Any], state: TrainerState) -> Restart | bool:
        if state.global_step > 0 and self.replan:
            return True
        restart = record.get("restart")
        return Restart(restart["step"], tuple(restart["ranks"])) if restart else False

    def _refuse_another_shape(self, record: dict[str, Any], state: TrainerState) -> None:
        if self.replan or self.controller is None or self._shape is None or not self.controller.scheduled:
            return
        if changes := self._shape.changes_from(record.get("shape", {})):
            self.controller.close()
            raise ConfigError(
                f"the checkpoint of step {state.global_step} belongs to another run: {'; '.join(changes)}. A rank "
                "schedule is laid out over the whole run, so the ranks would no longer be those it was meant to "
                "have. Resume with the settings of that run, or give RankCallback(replan=True): the schedule then "
                f"begins anew from the present ranks, over the {state.max_steps - state.global_step} steps that remain."
            )

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
        """Add to what the trainer logs about a training step: total rank and budget, how the routers do."""
        if logs is None or "loss" not in logs:
            return
        added: dict[str, float] = {} if self.routers is None else self.routers.read(state.global_step)
        if self.controller is not None:
            added["total_rank"] = self.controller.total_rank()
            if self.controller.scheduled:
                added["rank_budget"] = self.controller.budget()
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Detach, and raise if steps were taken of which none reached the controller."""
        if self.routers is not None:
            self.routers.close()
        if self.controller is None:
            return
        if state.global_step > self._began:
            self.controller.finish()
        else:
            self.controller.close()


def _saved_states(state: TrainerState) -> dict[str, Any]:
    """What callbacks have left in the checkpoint that training goes on from, by the names of their classes."""
    # transformers declares it as the list that it is made from.
    return cast(dict[str, Any], state.stateful_callbacks)


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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting where a checkpoint left off, and find its best model again should the run have moved."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            return
        if saved := _saved_states(state).get(type(self).__name__):
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience
        if state.best_global_step is not None:
            best = Path(cast(str, args.output_dir)) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

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
