"""From the friendly words of a recipe's `train` section to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from ranktune.errors import RecipeError
from ranktune.recipe import Recipe
from ranktune.run.directory import RunDirectory

if TYPE_CHECKING:
    from ranktune.tasks import Task


def training_arguments(recipe: Recipe, task: Task) -> TrainingArguments:
    """The arguments of the task's trainer.

    Raises:
        RecipeError: the machine cannot compute in the precision asked for, or transformers refuses a combination.
    """
    train, output = recipe.train, Path(recipe.output)
    no_accelerator = not torch.accelerator.is_available()
    if train.precision == "fp16" and no_accelerator:
        raise RecipeError("'train.precision' is 'fp16', which needs a GPU; on a CPU use fp32 or bf16.")
    fields: dict[str, Any] = {
        "output_dir": str(RunDirectory(output).checkpoints),
        "run_name": output.name,
        "use_cpu": no_accelerator,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.eval_batch_size,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "warmup_steps": train.warmup_ratio,  # below 1 it is a share of the steps
        "lr_scheduler_type": train.lr_scheduler,
        "optim": train.optimizer,
        "gradient_accumulation_steps": train.gradient_accumulation,
        _checkpointing_field(): train.gradient_checkpointing,
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "seed": train.seed,
        "logging_steps": train.logging_steps,
        "logging_first_step": True,
        "report_to": train.report_to or "none",
        "dataloader_num_workers": train.num_workers,
        "torch_compile": train.torch_compile,
        "save_total_limit": train.save_total_limit,
        "load_best_model_at_end": train.early_stopping_patience is not None,
        "metric_for_best_model": task.metric,
        "greater_is_better": task.greater_is_better,
        "disable_tqdm": True,
        **_occasion("eval", train.eval_every),
        **_occasion("save", train.save_every),
        **task.training_arguments,
        **train.trainer,
    }
    try:
        return task.arguments_class(**fields)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"section 'train': transformers refuses these training arguments: {error}") from error


def _occasion(kind: str, every: int | float | str) -> dict[str, Any]:
    """`eval_strategy`, `eval_steps` (or `save_...`) for steps, a fraction of the run, "epoch" or "never"."""
    if every == "never":
        return {f"{kind}_strategy": "no"}
    if every == "epoch":
        return {f"{kind}_strategy": "epoch"}
    return {f"{kind}_strategy": "steps", f"{kind}_steps": every}


def _checkpointing_field() -> str:
    """The field was renamed within transformers 5; the old name warns where the new one exists."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
