"""A Trainer built from a prepared run: the same one scores before and after training, and in `ranktune evaluate`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import datasets
import transformers
from peft.utils.warning import PeftWarning
from transformers import DataCollator, PrinterCallback, Trainer, TrainerCallback

from ranktune.left_out import LeftOutWarning
from ranktune.run.prepare import Prepared
from ranktune.run.trainer import trainer_class


def build_trainer(
    prepared: Prepared,
    model: Any,
    tokenizer: Any,
    *,
    train: datasets.Dataset | None,
    evaluation: datasets.Dataset,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The task's Trainer on tokenised data, silent but for `callbacks`."""
    task = prepared.task
    trainer = trainer_class(task.trainer_class)(
        model=model,
        args=prepared.arguments,
        data_collator=cast(DataCollator, task.collator(tokenizer, _base_of(model))),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=partial(task.compute_metrics, examples=evaluation),
        preprocess_logits_for_metrics=task.preprocess_logits,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Silence inside the block what transformers says about itself: bars, advice, a new head's missing weights."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks a model for its old name of this property; nothing a user could change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.simplefilter("ignore", LeftOutWarning)  # said in the run's own output
            # PEFT takes a module that AdaLoRA pruned to rank 0 for a sharded file.
            warnings.filterwarnings("ignore", r"Adapter .* tensor\(s\) have invalid shape", PeftWarning)
            # And the masks in its configuration for names of modules. Patterns of ours for nothing are refused by name.
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
