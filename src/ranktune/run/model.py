"""Building the model of a run: a skeleton without weights to check a recipe on, and the real one to train."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from ranktune.adapter_file import TENSOR_FILE, read_adapter
from ranktune.baselines import Baseline
from ranktune.baselines.penalty import penalise_training_only
from ranktune.config import RankConfig
from ranktune.errors import AdapterFileError, RecipeError
from ranktune.quantised_weight import keep_layout
from ranktune.run.quantization import quantization_config, unquantised

if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel

    from ranktune.recipe import Recipe
    from ranktune.tasks import Data, Task
    from ranktune.tasks.models import ModelSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AUTO_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
# PEFT trains and saves a classifier's new head under these names.
_CLASSIFIER_HEADS = ("classifier", "score")


def skeleton(source: ModelSource, task: Task, data: Data | None = None) -> PreTrainedModel:
    """The task's model from its configuration alone, on the meta device: every module's name and shape, no storage.

    Raises:
        RecipeError: the configuration cannot be found or read, or its architecture does not fit the task.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, revision=source.revision or "main")
        if data is not None and (data.labels is not None or task.peft_task_type == "SEQ_CLS"):
            config.num_labels = len(data.labels or ["score"])
        with torch.device("meta"):
            return _AUTO_CLASSES[task.peft_task_type].from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"model: '{source.name}' cannot be used for {task.name}: {error}") from error


def pretrained(source: ModelSource, task: Task, recipe: Recipe) -> PreTrainedModel:
    """The base model with its weights, quantised as the recipe says; seeded first because a new head is random."""
    quantised = None
    if recipe.quantization is not None:
        kept = unquantised(recipe.quantization, skeleton(source, task), modules_trained_in_full(recipe, task))
        quantised = quantization_config(recipe.quantization, kept, DTYPES[recipe.train.precision])
    set_seed(recipe.train.seed)
    try:
        model = task.load_model(
            source.path,
            dtype=DTYPES[recipe.train.base_dtype],
            revision=source.revision,
            quantization_config=quantised,
        )
    except OSError as error:
        raise RecipeError(f"model: the weights of '{source.name}' cannot be loaded: {error}") from error
    keep_layout(model)
    _keep_trained_modules_in_float32(model, modules_trained_in_full(recipe, task))
    return model


def adapted(base: PreTrainedModel, config: RankConfig | Baseline, seed: int) -> PeftModel | PeftMixedModel:
    """The base model with a fresh adapter on it, seeded by itself so that it does not depend on the base's head."""
    set_seed(seed)
    return config.put_on(base) if isinstance(config, Baseline) else peft.get_peft_model(base, config)


def restored(base: PreTrainedModel, adapter: Path) -> PeftModel | PreTrainedModel:
    """The base model with a saved adapter on it, or the model that was saved whole, ready to be evaluated.

    Raises:
        AdapterFileError: the adapter's file has not all its tensors, for which PEFT would take random ones, or has more
            than the model has places for.
    """
    if not (adapter / peft.utils.CONFIG_NAME).exists():
        return type(base).from_pretrained(adapter, dtype=base.dtype)
    # Stock AdaLoRA's forward, which adds its penalty to the loss, works in the trainable state only.
    trainable = peft.PeftConfig.from_pretrained(str(adapter)).peft_type == peft.PeftType.ADALORA
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            model = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
        except UserWarning as warning:
            missing = str(warning).partition(": ")[2].strip("[].").replace(".default.", ".").split(", ")
            raise AdapterFileError(
                f"{adapter / TENSOR_FILE} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more." if missing[1:] else ".")
            ) from warning
    _refuse_left_over(model, adapter)
    penalise_training_only(model)
    return model


def _refuse_left_over(model: PeftModel, adapter: Path) -> None:
    """PEFT leaves tensors out, without a word, for which the model has no module."""
    places = peft.get_peft_model_state_dict(model)
    if left := sorted(name for name in read_adapter(adapter).tensors if name not in places):
        raise AdapterFileError(
            f"{adapter / TENSOR_FILE} holds {left[0]}, for which the base model {model.name_or_path!r} has no place: "
            "it belongs to another."
        )


def modules_trained_in_full(recipe: Recipe, task: Task) -> list[str]:
    """Names, or ends of names, of the modules that are trained beside the adapter."""
    heads = list(_CLASSIFIER_HEADS) if task.peft_task_type == "SEQ_CLS" else []
    return [*heads, *(task.head_modules or []), *(recipe.method.get("modules_to_save") or [])]


def _keep_trained_modules_in_float32(model: nn.Module, names: list[str]) -> None:
    """A half-precision base is frozen, but what is trained beside the adapter would lose its small steps in it."""
    for name, module in model.named_modules():
        if any(name == end or name.endswith(f".{end}") for end in names):
            module.float()
