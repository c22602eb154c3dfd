"""Checks of a recipe's open sections against the classes they configure: the method's, and `TrainingArguments`."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from ranktune.errors import ConfigError, RecipeError, did_you_mean
from ranktune.recipe.schema import TrainRecipe

if TYPE_CHECKING:
    from ranktune.baselines import Baseline
    from ranktune.config import RankConfig

# What PEFT and the run fill in by themselves.
_SET_BY_THE_RUN = frozenset(
    {
        "method",
        "task_type",
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
)

# TrainingArguments fields that have a friendly name of their own, or that the run must decide.
_FRIENDLY = {
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "warmup_steps": "train.warmup_ratio",
    "lr_scheduler_type": "train.lr_scheduler",
    "optim": "train.optimizer",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "max_grad_norm": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "seed": "train.seed",
    "eval_strategy": "train.eval_every",
    "eval_steps": "train.eval_every",
    "save_strategy": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.save_total_limit",
    "logging_steps": "train.logging_steps",
    "report_to": "train.report_to",
    "dataloader_num_workers": "train.num_workers",
    "torch_compile": "train.torch_compile",
    "output_dir": "output",
}
_DECIDED_BY_THE_RUN = frozenset(
    {
        "disable_tqdm",
        "logging_strategy",
        "do_train",
        "do_eval",
        "do_predict",
        "remove_unused_columns",
        "resume_from_checkpoint",
        "restore_callback_states_from_checkpoint",
        "ignore_data_skip",
        "local_rank",
        "deepspeed",
        "metric_for_best_model",
        "greater_is_better",
        "eval_on_start",
    }
)


def complete_method(method: dict[str, Any], file: str) -> dict[str, Any]:
    """The `method` section with every default of the method's configuration class written out.

    With `init_from` the fields that the adapter there decides are taken from it; a section that is complete already
    is not read anew, since a run goes on when the folder has gone.

    Raises:
        RecipeError: no such method, or it has no such field.
        ConfigError: the configuration class refuses a value, or `init_from` contradicts it.
        AdapterFileError: `init_from` is no adapter to start from.
    """
    config_class = method_class(method, file)
    fields = method_fields(config_class)
    for name in method:
        if name in fields or name == "name" or (name == "init_from" and _can_start(config_class)):
            continue
        if name == "init_from":
            raise RecipeError(
                f"{file}: 'method.init_from' starts a method of ranktune's from a saved adapter, and "
                f"'{method['name']}' is none of them."
            )
        if name in _SET_BY_THE_RUN:
            raise RecipeError(f"{file}: 'method.{name}' is set by the run itself; remove it.")
        near = did_you_mean(name, fields).replace("'", "'method.", 1)
        raise RecipeError(
            f"{file}: unknown key 'method.{name}' for method '{method['name']}'."
            f"{near or ' Known keys: ' + ', '.join(fields) + '.'}"
        )
    if method.get("init_from") is not None and not all(name in method for name in fields):
        method = {**method, **fields_of_start(method, file)}
    complete = {"name": method["name"], **({"init_from": method.get("init_from")} if _can_start(config_class) else {})}
    complete |= {name: method.get(name, _default(field)) for name, field in fields.items()}
    if "target_modules" in complete and complete["target_modules"] is None:
        complete["target_modules"] = "all-linear"
    method_config(complete, file)
    return complete


def fields_of_start(method: dict[str, Any], file: str) -> dict[str, Any]:
    """What the adapter in `init_from` decides of the method's fields.

    Raises:
        RecipeError: `init_from` is no text.
        AdapterFileError, ConfigError: there is no adapter to start from, or a field contradicts it.
    """
    from ranktune.foreign_start import read_start, start_fields

    place = method["init_from"]
    if not isinstance(place, str) or not place:
        raise RecipeError(f"{file}: 'method.init_from' is {place!r}; name the folder of an adapter.")
    given = {name: value for name, value in method.items() if name not in ("name", "init_from")}
    if given.get("target_modules") == "all-linear":
        raise RecipeError(f"{file}: 'method.target_modules' is decided by 'method.init_from': leave it out.")
    return start_fields(read_start(place), method["name"], given)


def _can_start(config_class: type[RankConfig] | type[Baseline]) -> bool:
    """Whether it is a method of ours, which `init_from` is for."""
    from ranktune.config import RankConfig

    return issubclass(config_class, RankConfig)


def method_fields(config_class: type[RankConfig] | type[Baseline]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a method that a recipe may set, by name."""
    return {field.name: field for field in dataclasses.fields(config_class) if field.name not in _SET_BY_THE_RUN}


def method_class(method: dict[str, Any], file: str) -> type[RankConfig] | type[Baseline]:
    """The class of the fields of what the recipe's `method.name` means."""
    import ranktune.methods  # noqa: F401  (importing the methods registers them)
    from ranktune.baselines import BASELINES
    from ranktune.config import METHODS

    name, known = method.get("name"), {**METHODS, **BASELINES}
    if not isinstance(name, str) or name not in known:
        missing = "'method.name' is missing." if name is None else f"unknown method {name!r} in 'method.name'."
        near = did_you_mean(name, known) if isinstance(name, str) else ""
        raise RecipeError(f"{file}: {missing}{near} Methods: {', '.join(known)}.")
    return known[name]


def method_config(method: dict[str, Any], file: str, task_type: str | None = None) -> RankConfig | Baseline:
    """Build the method's configuration from a complete `method` section.

    Raises:
        ConfigError: the configuration class refuses a value, for whatever reason it gives.
    """
    # PEFT extends the lists it is given in place (modules_to_save): the recipe keeps its own.
    values = copy.deepcopy({name: value for name, value in method.items() if name not in ("name", "init_from")})
    try:
        return method_class(method, file)(task_type=task_type, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: section 'method': {error}") from error


def checked_trainer_fields(train: TrainRecipe, file: str) -> dict[str, Any]:
    """`train.trainer`, once its keys and the names of optimizer, scheduler and trackers are known to exist.

    Raises:
        RecipeError: an unknown name (with the closest known one), or a key that has its own place in a recipe.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames, TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in train.trainer:
        _check_trainer_field(name, known, file)
    _check_choice("train.optimizer", train.optimizer, [item.value for item in OptimizerNames], file)
    _check_choice("train.lr_scheduler", train.lr_scheduler, [item.value for item in SchedulerType], file)
    _check_trackers(train.report_to, file)
    return train.trainer


def _check_trainer_field(name: str, known: set[str], file: str) -> None:
    if name in _FRIENDLY:
        raise RecipeError(f"{file}: 'train.trainer.{name}' has its own key in a recipe: set '{_FRIENDLY[name]}'.")
    if name in _DECIDED_BY_THE_RUN:
        raise RecipeError(f"{file}: 'train.trainer.{name}' is decided by the run itself; remove it.")
    if name not in known:
        near = did_you_mean(name, known).replace("'", "'train.trainer.", 1)
        raise RecipeError(f"{file}: unknown key 'train.trainer.{name}': TrainingArguments has no such field.{near}")


def _check_choice(key: str, value: str, known: list[str], file: str) -> None:
    if value not in known:
        longer = [name for name in known if name.startswith(value)] if value else []  # "adamw": "adamw_torch"
        near = did_you_mean(value, longer[:1] or known) or f" Known: {', '.join(known)}."
        raise RecipeError(f"{file}: '{key}' is {value!r}, which transformers does not know.{near}")


def _check_trackers(names: list[str], file: str) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name in ("none", "all"):
            continue
        _check_choice("train.report_to", name, list(INTEGRATION_TO_CALLBACK), file)
        if name not in get_available_reporting_integrations():
            raise RecipeError(
                f"{file}: 'train.report_to' names '{name}', which is not installed here: install it first."
            )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
