"""Causal language modelling: a running text cut into blocks, or prompts with the completions to learn.

Every score is a sum over tokens divided by their number, so neither padding nor the size of the batches
matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, cast

import datasets
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq

from ranktune.errors import DataError, RecipeError
from ranktune.tasks.base import Data, Task, check_length, first_output, positions
from ranktune.tasks.tokenization import map_examples, token_ids

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from ranktune.recipe import DataRecipe

IGNORED = -100  # a label that no loss counts


class CausalLM(Task):
    """Predict the next token.

    Plain `text`: all rows make one stream, start + row + end + row + end ..., cut into blocks of `max_length`
    that overlap by one token, so every token but the start is predicted exactly once.
    `prompt` + `completion`: only the completion and the end of text are predicted. An example that is too
    long loses the start of its prompt; a completion that is too long by itself is refused.
    """

    name: ClassVar[str] = "causal-lm"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

    def __init__(self, recipe: DataRecipe, data: Data) -> None:
        super().__init__(recipe, data)
        self.scored_role = "text" if "text" in data.evaluation.column_names else "completion"
        self.evaluation_characters = sum(len(text) for text in data.evaluation[self.scored_role])

    def load_model(self, path: str, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
        """Load the language model. Raises RecipeError when `max_length` is more than its positions."""
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
        check_length("data.max_length", self.max_length, positions(config), "model")
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, revision=revision or "main")

    def load_tokenizer(self, path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        """Load the tokenizer; it pads on the right, as training needs (generation would pad on the left)."""
        tokenizer = super().load_tokenizer(path, revision)
        tokenizer.padding_side = "right"
        return tokenizer

    def tokenize(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Return blocks of the running text, or one example per prompt; labels to ignore are -100."""
        check_length("data.max_length", self.max_length, tokenizer.model_max_length, "tokenizer")
        return (self._blocks if self.scored_role == "text" else self._pairs)(dataset, tokenizer)

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,  # noqa: ARG002 - labels are shifted inside the model
    ) -> DataCollatorForSeq2Seq:
        """Pad to the longest example of the batch, the labels with -100."""
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, vocabulary] -> [batch, 2]: the sum of the losses in nats, and how many they are."""
        rows = zip(first_output(logits)[:, :-1], labels[:, 1:], strict=True)
        # Row by row: float32 logits of a whole batch would double the memory that evaluation needs.
        sums = [cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="sum") for row, label in rows]
        return torch.stack([torch.stack(sums), (labels[:, 1:] != IGNORED).sum(dim=1).float()], dim=1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return nats per token, its exponential, and nats per character of the evaluation split's text."""
        nats, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        with np.errstate(over="ignore"):
            perplexity = np.exp(nats / tokens)
        return {
            "nats_per_token": float(nats / tokens),
            "perplexity": float(perplexity),
            "nats_per_character": float(nats / self.evaluation_characters),
        }

    def _blocks(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        start, end = _ends(tokenizer)
        pieces = [np.array(start, dtype=np.int32)]
        batches = cast("Iterator[dict[str, list[str]]]", dataset.iter(batch_size=1000))
        for rows in batches:
            filled = [text for text in rows["text"] if text]  # an empty row is a blank line, not a document
            pieces += [np.array(ids + end, dtype=np.int32) for ids in token_ids(tokenizer, filled)]
        stream = np.concatenate(pieces)
        if len(stream) < 2:
            raise DataError("data: a split holds no text to predict, only empty rows.")
        firsts = range(0, len(stream) - 1, self.max_length - 1)
        blocks = [stream[first : first + self.max_length] for first in firsts]
        return datasets.Dataset.from_dict(
            {
                "input_ids": blocks,
                "attention_mask": [np.ones(len(block), dtype=np.int8) for block in blocks],
                "labels": blocks,  # the model does not predict a block's first token, the last of the one before
            }
        )

    def _pairs(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        start, end = _ends(tokenizer)

        def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
            encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
            prompts, completions = token_ids(tokenizer, rows["prompt"]), token_ids(tokenizer, rows["completion"])
            for prompt, completion, text in zip(prompts, completions, rows["completion"], strict=True):
                answer = completion + end
                room = self.max_length - len(start) - len(answer)
                if room < 0:
                    raise RecipeError(
                        f"data.max_length: the completion '{text[:40]}...' alone takes {self.max_length - room} "
                        f"tokens, more than {self.max_length}. Set {self.max_length - room} or more, or shorten it."
                    )
                context = start + prompt[max(0, len(prompt) - room) :]
                encoded["input_ids"].append(context + answer)
                encoded["attention_mask"].append([1] * len(context + answer))
                encoded["labels"].append([IGNORED] * len(context) + answer)
            return encoded

        return map_examples(dataset, encode)


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token that opens a text (some models have only one that closes it) and the one that closes it."""
    first, last = cast("int | None", tokenizer.bos_token_id), cast("int | None", tokenizer.eos_token_id)
    end = [] if last is None else [last]
    start = end if first is None else [first]
    return start, end
