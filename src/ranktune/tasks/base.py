"""What a task is: the model, tokenizer, examples, batches and scores that a trainer needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments

from ranktune.errors import RecipeError
from ranktune.tasks.character_tokenizer import character_tokenizer
from ranktune.tasks.vocabulary import TASKS, check_words

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ranktune.recipe import DataRecipe


@dataclass(frozen=True)
class Data:
    """Loaded examples: two splits whose columns are named by role, and what is known about them.

    `labels`: class names in the order of their numbers, for classification only. `description`: one line for
    humans. `fingerprint`: a hash of both splits' content, equal only for equal data.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset
    task: str
    labels: list[str] | None
    description: str
    fingerprint: str


class Task(ABC):
    """Turns examples into what a `transformers.Trainer` takes, and its predictions into scores."""

    name: ClassVar[str]
    peft_task_type: ClassVar[str]
    head_modules: ClassVar[list[str] | None] = None  # PEFT's task type already trains and saves a new SEQ_CLS head
    trainer_class: ClassVar[type[Trainer]] = Trainer
    arguments_class: ClassVar[type[TrainingArguments]] = TrainingArguments

    def __init__(self, recipe: DataRecipe, data: Data) -> None:  # noqa: ARG002 - for the tasks that need it
        """Raises RecipeError when the recipe's metric is not one of this task's."""
        check_words(self.name, (), recipe.metric)
        self.max_length = recipe.max_length
        metrics = TASKS[self.name].metrics
        self.metric = recipe.metric or next(iter(metrics))
        self.greater_is_better = metrics[self.metric]

    @property
    def training_arguments(self) -> dict[str, Any]:
        """Fields of `arguments_class` that this task needs changed."""
        return {}

    @abstractmethod
    def load_model(
        self,
        path: str,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        quantization_config: Any = None,
    ) -> PreTrainedModel:
        """Load the pretrained model with the head this task needs, quantised where a configuration of that is given.

        Seed first, because a new head is random.
        """

    def load_tokenizer(self, path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with a padding token even where the model came without one."""
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
        tokenizer = character_tokenizer(config) or AutoTokenizer.from_pretrained(path, revision=revision or "main")
        if tokenizer.pad_token is None:
            # Padding is masked out of attention and loss, so any token will do; the end of text is the custom.
            substitute = tokenizer.eos_token or tokenizer.unk_token
            if substitute is None:
                raise RecipeError(
                    f"model: the tokenizer of '{path}' has neither a padding, an end-of-text nor an unknown token, "
                    "so batches cannot be padded. Set its pad_token and save it again."
                )
            tokenizer.pad_token = substitute
        return tokenizer

    @abstractmethod
    def tokenize(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Return the examples as token ids, with the answers in `labels`."""

    @abstractmethod
    def collator(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Return the function that pads examples into a batch."""

    @abstractmethod
    def compute_metrics(self, prediction: EvalPrediction, examples: datasets.Dataset) -> dict[str, float]:
        """Return every metric of the task, by name; `examples`: what was predicted, as `tokenize` returned it."""

    @abstractmethod
    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce a batch of logits to what `compute_metrics` needs, before the whole split is gathered."""


def check_length(field: str, length: int, limit: int | None, owner: str) -> None:
    """Raise RecipeError when `length` tokens are more than the model or tokenizer (`owner`) can take."""
    if limit is not None and length > limit:
        raise RecipeError(f"{field}: {length} tokens, but the {owner} takes {limit}. Set {limit} or less.")


def positions(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model has positions for, None where there is no fixed number."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def first_output(logits: Any) -> torch.Tensor:
    """Return the logits proper: some models hand out a tuple with caches or hidden states behind them."""
    return logits[0] if isinstance(logits, tuple) else logits
