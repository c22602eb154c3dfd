"""The task's own Trainer class, with ranktune's optimizer groups, and scoring that leaves training as it was."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

import ranktune

# Optimizers such as GaLore, LOMO or Muon choose or build their own groups: transformers marks them by these keys.
_OWN_GROUPS = frozenset({"params", "model", "optimizer_dict"})


class RankTrainerMixin(Trainer):
    """Takes the optimizer class Trainer would take, and gives it the groups of `ranktune.parameter_groups`."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's training, once it is known how the model's loss must be averaged over micro-batches."""
        split = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1
        if split and self.model_accepts_loss_kwargs:
            self.model_accepts_loss_kwargs = self._loss_heeds_item_count()
        return super().train(*args, **kwargs)

    def _loss_heeds_item_count(self) -> bool:
        """Whether the model divides its loss by the `num_items_in_batch` it is given, found by asking it twice.

        Trainer looks only at the signature, but most classifiers and encoder-decoders swallow the argument and return
        a plain mean; Trainer then adds the means up, and loss and gradients grow with the number of micro-batches.
        """
        model, examples = cast(nn.Module, self.model), cast(Dataset, self.train_dataset)
        batch = self._prepare_inputs(self.data_collator([examples[0]]))
        mode = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            one, two = (model(**batch, num_items_in_batch=torch.tensor(count)).loss for count in (1, 2))
        model.train(mode)
        return not torch.equal(one, two)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation, with the random state put back: how often a run is scored must not change it."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer once; optimizers that make their own groups are left to Trainer."""
        tuned = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, tuned)  # pyright: ignore[reportArgumentType]
            if inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer):
                self._from_groups(optimizer_class, settings, tuned)
        return super().create_optimizer(model)

    def _from_groups(self, optimizer_class: type[torch.optim.Optimizer], settings: dict[str, Any], tuned: Any) -> None:
        if _OWN_GROUPS & settings.keys():
            return
        groups = ranktune.parameter_groups(tuned, self.args.learning_rate, self.args.weight_decay)
        self.optimizer = optimizer_class(groups, **settings)


def trainer_class(base: type[Trainer]) -> type[Trainer]:
    """`base` (Trainer, Seq2SeqTrainer...) with `RankTrainerMixin` in front."""
    return type(f"Rank{base.__name__}", (RankTrainerMixin, base), {})
