"""The task's own Trainer class, with ranktune's optimizer groups, and scoring that leaves training as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

import ranktune
from ranktune.run.checkpoints import refuse_damaged_best

# Optimizers such as GaLore, LOMO or Muon choose or build their own groups: transformers marks them by these keys.
_OWN_GROUPS = frozenset({"params", "model", "optimizer_dict"})


class EpochSeededSampler(LengthGroupedSampler):
    """Texts of like length together, in an order that the seed and the epoch decide.

    Transformers' own order depends on the random state where an epoch began, which a run that resumes in the middle of
    one no longer has.
    """

    def __init__(self, like: LengthGroupedSampler, seed: int) -> None:
        super().__init__(like.batch_size, lengths=like.lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


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

    def _load_best_model(self) -> None:
        """Trainer's, unless the checkpoint's files are not those that were written.

        Raises:
            AdapterFileError: they are not; the message says what can be done.
        """
        best = Path(str(self.state.best_model_checkpoint))
        refuse_damaged_best(best.parent, int(best.name.rpartition("-")[2]))
        super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where a resumed run was already at its end: Trainer would take one more step."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[Any] | None:
        """Trainer's, but one that can be begun again at any epoch."""
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSeededSampler(sampler, seed)
        return sampler

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
