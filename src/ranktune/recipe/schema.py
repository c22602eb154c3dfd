"""The sections of a recipe: their keys, types, defaults and bounds (pydantic, strict, nothing extra allowed)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16", "fp16"]
Quantization = Literal["nf4", "int8", "torchao-int8"]


def _is_occasion(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    whole, part = isinstance(value, int) and value >= 1, isinstance(value, float) and 0 < value < 1
    return value in ("epoch", "never") or whole or part


def _occasion(value: Any) -> Any:
    """Steps (1, 2, ...), a fraction of the run (0 < x < 1), "epoch" or "never"."""
    if not _is_occasion(value):
        raise ValueError('must be a number of steps (50), a fraction of the run (0.25), "epoch" or "never"')
    return value


def _texts(value: Any) -> Any:
    """Class names may be written as numbers: `labels: [0, 1]` means "0" and "1"."""
    if not isinstance(value, list):
        return value
    return [str(item) if type(item) in (int, float) else item for item in value]


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _named(value: Any) -> Any:
    """`method: dora` is short for `method: {name: dora}`."""
    return {"name": value} if isinstance(value, str) else value


# Of a run: checkpoints of an adapter are small.
_TENTH = 0.1

Positive = Annotated[int, Field(gt=0)]
Occasion = Annotated[Any, BeforeValidator(_occasion)]


class Section(BaseModel):
    """Values are never converted silently: `"8"` is not 8, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataRecipe(Section):
    """Where the examples come from, what the task is, and which columns play which role."""

    source: str = "stdlib-docstrings"
    config: str | None = None
    revision: str | None = None
    task: str | None = None
    train: str | None = None
    evaluation: str | None = None
    evaluation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    # Score on this share of the training examples, and do not train on it: for choosing settings.
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    columns: dict[str, str] = {}
    replace: dict[str, dict[Annotated[str, Field(min_length=1)], str]] = {}
    skip_incomplete: bool = False
    header: bool = True
    delimiter: str | None = None
    quoting: bool = True
    labels: Annotated[list[str] | None, BeforeValidator(_texts)] = None
    max_length: Positive = 128
    max_target_length: Positive = 64
    loss_on: Literal["completion", "everything"] = "completion"
    max_train_examples: Positive | None = None
    max_eval_examples: Positive | None = None
    metric: str | None = None


class TrainRecipe(Section):
    """How to train. `trainer` passes any other field to `transformers.TrainingArguments` by its own name."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Positive | None = None
    batch_size: Positive = 32
    eval_batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lr_scheduler: str = "linear"
    optimizer: str = "adamw_torch_fused"
    gradient_accumulation: Positive = 1
    gradient_checkpointing: bool = False
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    precision: Precision = "fp32"
    base_dtype: Precision = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    early_stopping_patience: Positive | None = None
    eval_every: Occasion = "epoch"
    save_every: Occasion = _TENTH
    save_total_limit: Positive | None = 2
    logging_steps: Positive = 10
    report_to: Annotated[list[str], BeforeValidator(_one_or_more)] = []
    num_workers: Annotated[int, Field(ge=0)] = 0
    torch_compile: bool = False
    trainer: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _save_often(cls, values: Any) -> Any:
        """Without a word about checkpoints a crash costs at most a tenth of the run; where the best one is returned to,
        they are written whenever the model is evaluated."""
        if isinstance(values, dict) and values.get("save_every") is None:
            evaluated = values.get("eval_every", "epoch")
            follow = values.get("early_stopping_patience") is not None and _is_occasion(evaluated)
            return {**values, "save_every": evaluated if follow else _TENTH}
        return values

    @model_validator(mode="after")
    def _combinations(self) -> TrainRecipe:
        if self.early_stopping_patience is not None:
            if self.eval_every == "never":
                raise ValueError('early_stopping_patience needs evaluations: set eval_every to "epoch" or to steps')
            if self.save_every != self.eval_every:
                raise ValueError(
                    "early stopping returns to the best checkpoint, so checkpoints must be written when the model "
                    f"is evaluated: save_every is {self.save_every!r} but eval_every is {self.eval_every!r}; "
                    "leave save_every out"
                )
        if self.base_dtype != "fp32" and self.precision != self.base_dtype:
            raise ValueError(
                f"base_dtype {self.base_dtype} keeps the frozen weights in {self.base_dtype} and needs "
                f"precision: {self.base_dtype} (it is {self.precision})"
            )
        return self


class Recipe(Section):
    """A whole run. `method` holds the method's name and the fields of its configuration class."""

    model: str = "all-minilm"
    quantization: Quantization | None = None
    method: Annotated[dict[str, Any], BeforeValidator(_named)]
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    output: str

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, every default written out; as YAML it loads back to an equal recipe."""
        return self.model_dump()


# The section that each dotted prefix leads to. `method` and `train.trainer` are open here and checked in
# `recipe.choices` against the classes they configure.
SECTIONS: dict[str, type[Section]] = {"": Recipe, "data": DataRecipe, "train": TrainRecipe}

# Names people bring from elsewhere, and where a recipe keeps the same thing.
KNOWN_ELSEWHERE = {
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "activation_checkpointing": "train.gradient_checkpointing",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_steps": "train.warmup_ratio",
    "optim": "train.optimizer",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "dataloader_num_workers": "train.num_workers",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "output_dir": "output",
    "dataset": "data.source",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "quantization_config": "quantization",
    "rank": "method.r",
    "alpha": "method.lora_alpha",
    "dropout": "method.lora_dropout",
}
