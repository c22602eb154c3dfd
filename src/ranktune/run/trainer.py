"""The task's own Trainer class, with ranktune's optimizer groups."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Trainer

import ranktune

# Optimizers such as GaLore, LOMO or Muon choose or build their own groups: transformers marks them by these keys.
_OWN_GROUPS = frozenset({"params", "model", "optimizer_dict"})


class RankOptimizerMixin(Trainer):
    """Takes the optimizer class Trainer would take, and gives it the groups of `ranktune.parameter_groups`."""

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
    """`base` (Trainer, Seq2SeqTrainer...) with `RankOptimizerMixin` in front."""
    return type(f"Rank{base.__name__}", (RankOptimizerMixin, base), {})
