"""Everything about a run that can be known, and refused, before the model's weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import TrainingArguments

from ranktune.baselines import Baseline, Full
from ranktune.baselines.plan import baseline_plan
from ranktune.config import RankConfig
from ranktune.errors import ConfigError, RecipeError
from ranktune.foreign_start import Start, read_start, refuse_other_model
from ranktune.policy import NestedPolicy, RankPolicy
from ranktune.recipe import Recipe
from ranktune.recipe.choices import fields_of_start, method_config
from ranktune.run.arguments import training_arguments
from ranktune.run.model import DTYPES, modules_trained_in_full, skeleton
from ranktune.run.quantization import check_quantization, in_words, unquantised
from ranktune.run.steps import ExpectedSteps
from ranktune.run.targets import Plan, check_targets, plan
from ranktune.tasks import Data, Task, build_task, check_source, load_data
from ranktune.tasks.models import ModelSource, resolve_model


@dataclass(frozen=True)
class Prepared:
    """A checked recipe: its model's place, data and task, the method's and trainer's settings, and what it adapts.

    `start` is the adapter whose values the new one begins with, where the run begins and the recipe names one.
    """

    recipe: Recipe
    source: ModelSource
    data: Data
    task: Task
    config: RankConfig | Baseline
    arguments: TrainingArguments
    plan: Plan
    start: Start | None = None


@dataclass(frozen=True)
class Examples:
    """Both splits as token ids, the tokenizer that made them, and the length of the run over them.

    `end`: the size that ranks are moved to over such a run, in words.
    """

    tokenizer: Any
    train: datasets.Dataset
    evaluation: datasets.Dataset
    steps: ExpectedSteps
    end: str | None


def prepare(recipe: Recipe, file: str | Path, *, begins: bool = False) -> Prepared:
    """Find the model, load the data, and check the method's module names on a model without weights.

    Args:
        recipe: as `load_recipe` returns it. file: its file, for messages.
        begins: whether the run begins with this, so that the adapter in `method.init_from` has to be there.

    Raises:
        RecipeError: the model cannot be found, a module name matches nothing in it, or transformers or this machine
            cannot train as asked.
        DataError: the data is missing or does not fit the task.
        ConfigError: the method refuses its fields.
        AdapterFileError: the adapter in `method.init_from` is not there, or does not belong to the model.
    """
    start = _start(recipe, str(file)) if begins else None
    check_source(recipe.data)
    source = resolve_model(recipe.model)
    data = load_data(recipe.data, recipe.train.seed)
    task = build_task(recipe.data, data)
    arguments = training_arguments(recipe, task)
    config = method_config(_with_new_head(recipe.method, task), str(file), task_type=task.peft_task_type)
    model = skeleton(source, task, data)
    if start is not None:
        refuse_other_model(start, model, source.name)
    check_targets(config, model)
    _refuse_half_precision_in_full(config, recipe)
    quantised = None
    if recipe.quantization is not None:
        check_quantization(recipe.quantization, config)
        kept = unquantised(recipe.quantization, model, modules_trained_in_full(recipe, task))
        quantised = in_words(recipe.quantization, model, kept, DTYPES[recipe.train.base_dtype])
    planned = replace(plan_of(config, model), quantised=quantised)
    return Prepared(recipe, source, data, task, config, arguments, planned, start)


def _start(recipe: Recipe, file: str) -> Start | None:
    """The adapter to start from, which must still be the one that the recipe's fields were taken from."""
    place = recipe.method.get("init_from")
    if place is None:
        return None
    decided = fields_of_start(recipe.method, file)
    if changed := [name for name, value in decided.items() if recipe.method[name] != value]:
        raise RecipeError(
            f"{file}: 'method.{changed[0]}' is {recipe.method[changed[0]]!r}, and the adapter in 'method.init_from' "
            f"now has {decided[changed[0]]!r}. Leave it out, with all that the adapter decides."
        )
    return read_start(place)


def plan_of(config: RankConfig | Baseline, model: nn.Module) -> Plan:
    """What the method would train of a model without storage, which it changes.

    Raises:
        RecipeError: PEFT or the method finds nothing to adapt, or something it cannot adapt.
    """
    return baseline_plan(config, model) if isinstance(config, Baseline) else plan(config, model)


def prepare_examples(prepared: Prepared) -> Examples:
    """Turn the text into token ids, and check that the method's rank schedule fits into so many steps.

    Raises:
        RecipeError: an example does not fit the lengths asked for.
        ConfigError: the rank budget cannot be met in the run; the message shows the arithmetic.
    """
    task, source = prepared.task, prepared.source
    tokenizer = task.load_tokenizer(source.path, source.revision)
    train, evaluation = (task.tokenize(split, tokenizer) for split in (prepared.data.train, prepared.data.evaluation))
    steps = ExpectedSteps.of(prepared.arguments, len(train))
    try:
        policy = prepared.config.policy(prepared.plan.layout, steps.total)
    except ConfigError as error:
        raise ConfigError(
            f"section 'method': {error} The run has {steps.total:,} optimizer steps ({steps.arithmetic})."
        ) from error
    return Examples(tokenizer, train, evaluation, steps, _end(prepared.config, policy, steps.total))


def _end(config: RankConfig | Baseline, policy: RankPolicy | None, steps: int) -> str | None:
    """The budget at the end of the run, for a method that moves ranks."""
    if policy is None or isinstance(policy, NestedPolicy):
        return None
    if getattr(config, "target_params", None) is None:
        return f"total rank {policy.budget(steps):,}"
    return f"at most {policy.budget(steps):,} parameters in components"


def _with_new_head(method: dict[str, Any], task: Task) -> dict[str, Any]:
    """The task's own new modules are trained and saved with the adapter."""
    if not task.head_modules or "modules_to_save" not in method:
        return method
    return {**method, "modules_to_save": [*(method.get("modules_to_save") or []), *task.head_modules]}


def _refuse_half_precision_in_full(config: RankConfig | Baseline, recipe: Recipe) -> None:
    if isinstance(config, Full) and recipe.train.base_dtype != "fp32":
        raise RecipeError(
            f"train.base_dtype is '{recipe.train.base_dtype}', which is for weights that stay frozen; method 'full' "
            "trains them, and its small steps would be lost. Leave base_dtype out; 'precision' may stay."
        )
