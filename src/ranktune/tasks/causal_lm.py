"""Causal language modelling: a running text cut into blocks, prompts with completions, or conversations.

Every score is a sum over the tokens to learn divided by their number, so neither padding nor the size of the
batches matters.

Running text fills its blocks to the last token. Prompts and conversations are not packed: in one block they would
attend to each other, which a model served with one of them at a time never sees. Where their lengths differ much,
`train.trainer.train_sampling_strategy: group_by_length` saves the padding instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import datasets
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq

from ranktune.errors import DataError, RecipeError
from ranktune.tasks import chat
from ranktune.tasks.base import Data, Task, check_length, first_output, positions
from ranktune.tasks.tokenization import map_examples, token_ids
from ranktune.tasks.unknown import UnknownTokens

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from ranktune.recipe import DataRecipe

IGNORED = -100  # a label that no loss counts
# How many characters of text a row's labels stand for: for the score alone, never shown to the model.
CHARACTERS = "characters"


class CausalLM(Task):
    """Predict the next token.

    Plain `text`: all rows make one stream, start + row + end + row + end ..., cut into blocks of `max_length`
    that overlap by one token, so every token but the start is predicted exactly once.
    `prompt` + `completion`: only the completion and the end of text are predicted. An example that is too
    long loses the start of its prompt; a completion that is too long by itself is refused.
    `messages`: the tokenizer's chat template makes one text of them, and only what the assistant says is
    predicted, with what the template puts behind it. A conversation that is too long loses its oldest questions
    with their answers, never what the system says; a last answer that is too long with its question is refused.
    With `loss_on: everything` prompts, and what the others say, are predicted too.
    """

    name: ClassVar[str] = "causal-lm"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

    def __init__(self, recipe: DataRecipe, data: Data) -> None:
        super().__init__(recipe, data)
        self.answers_only = recipe.loss_on == "completion"
        layouts = {"text": self._blocks, "completion": self._pairs, "messages": self._conversations}
        self._encode = next(encode for role, encode in layouts.items() if role in data.train.column_names)

    def load_model(
        self,
        path: str,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        quantization_config: Any = None,
    ) -> PreTrainedModel:
        """Load the language model. Raises RecipeError when `max_length` is more than its positions."""
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
        check_length("data.max_length", self.max_length, positions(config), "model")
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, revision=revision or "main", quantization_config=quantization_config
        )

    def load_tokenizer(self, path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        """Load the tokenizer; it pads on the right, as training needs (generation would pad on the left)."""
        tokenizer = super().load_tokenizer(path, revision)
        tokenizer.padding_side = "right"
        return tokenizer

    def tokenize(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Return blocks of the running text, or one example per prompt or conversation; labels to ignore are -100.

        The column `characters` says how many characters of text the labels of a row stand for.
        """
        check_length("data.max_length", self.max_length, tokenizer.model_max_length, "tokenizer")
        return self._encode(dataset, tokenizer)

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,  # noqa: ARG002 - labels are shifted inside the model
    ) -> Callable[[list[dict[str, Any]]], Any]:
        """Pad to the longest example of the batch, the labels with -100."""
        return partial(_padded, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED))

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, vocabulary] -> [batch, 2]: the sum of the losses in nats, and how many they are."""
        rows = zip(first_output(logits)[:, :-1], labels[:, 1:], strict=True)
        # Row by row: float32 logits of a whole batch would double the memory that evaluation needs.
        sums = [cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="sum") for row, label in rows]
        return torch.stack([torch.stack(sums), (labels[:, 1:] != IGNORED).sum(dim=1).float()], dim=1)

    def compute_metrics(self, prediction: EvalPrediction, examples: datasets.Dataset) -> dict[str, float]:
        """Return nats per token, its exponential, and nats per character of the text to learn.

        Ends and what a template puts around a message are tokens, but no characters of the text.
        """
        nats, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        with np.errstate(over="ignore"):
            perplexity = np.exp(nats / tokens)
        return {
            "nats_per_token": float(nats / tokens),
            "perplexity": float(perplexity),
            "nats_per_character": float(nats / sum(examples[CHARACTERS])),
        }

    def _blocks(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        start, end = _ends(tokenizer)
        unknown = UnknownTokens(tokenizer)
        pieces, lengths = [np.array(start, dtype=np.int32)], [np.zeros(len(start), dtype=np.int64)]
        batches = cast("Iterator[dict[str, list[str]]]", dataset.iter(batch_size=1000))
        for rows in batches:
            filled = [text for text in rows["text"] if text]  # an empty row is a blank line, not a document
            for text, ids in zip(filled, token_ids(tokenizer, filled), strict=True):
                unknown.count(text, ids)
                pieces.append(np.array(ids + end, dtype=np.int32))
                lengths.append(_at_the_last(len(text), len(pieces[-1])))
        stream, characters = np.concatenate(pieces), np.concatenate(lengths)
        if len(stream) < 2:
            raise DataError("data: a split holds no text to predict, only empty rows.")
        unknown.warn("text", _FLATTERS)
        firsts = range(0, len(stream) - 1, self.max_length - 1)
        blocks = [stream[first : first + self.max_length] for first in firsts]
        return datasets.Dataset.from_dict(
            {
                "input_ids": blocks,
                "attention_mask": [np.ones(len(block), dtype=np.int8) for block in blocks],
                "labels": blocks,  # the model does not predict a block's first token, the last of the one before
                CHARACTERS: [int(characters[first + 1 : first + self.max_length].sum()) for first in firsts],
            }
        )

    def _pairs(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        start, end = _ends(tokenizer)
        unknown = UnknownTokens(tokenizer)

        def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
            encoded = _Rows()
            prompts, completions = token_ids(tokenizer, rows["prompt"]), token_ids(tokenizer, rows["completion"])
            texts = zip(rows["prompt"], rows["completion"], strict=True)
            for prompt, completion, (asked, text) in zip(prompts, completions, texts, strict=True):
                unknown.count(text, completion)
                answer = completion + end
                room = self.max_length - len(start) - len(answer)
                if room < 0:
                    raise RecipeError(
                        f"data.max_length: the completion '{text[:40]}...' alone takes {self.max_length - room} "
                        f"tokens, more than {self.max_length}. Set {self.max_length - room} or more, or shorten it."
                    )
                kept = prompt[max(0, len(prompt) - room) :]
                learned = [not self.answers_only] * len(start + kept) + [True] * len(answer)
                before = 0 if self.answers_only else len(asked if kept == prompt else tokenizer.decode(kept))
                encoded.add(start + kept + answer, learned, before + len(text))
            return encoded.columns

        tokenized = map_examples(dataset, encode)
        unknown.warn("completions", _FLATTERS)
        return tokenized

    def _conversations(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        chat.require_template(tokenizer)
        unknown = UnknownTokens(tokenizer)

        def encode(rows: dict[str, list[list[chat.Message]]]) -> dict[str, Any]:
            encoded = _Rows()
            for messages in rows["messages"]:
                fitted = chat.fitted(
                    chat.without_gaps(messages), tokenizer, self.max_length, answers_only=self.answers_only
                )
                texts = [
                    message["content"]
                    for message in fitted.messages
                    if not self.answers_only or message["role"] == chat.ASSISTANT
                ]
                ids = [token for token, learned in zip(fitted.ids, fitted.learned, strict=True) if learned]
                unknown.count(" ".join(texts), ids)
                encoded.add(fitted.ids, fitted.learned, sum(map(len, texts)))
            return encoded.columns

        tokenized = map_examples(dataset, encode)
        unknown.warn("messages", _FLATTERS)
        return tokenized


class _Rows:
    """Tokenised examples, column by column."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], CHARACTERS: []}

    def add(self, ids: list[int], learned: list[bool], characters: int) -> None:
        """Append an example, whose labels are its ids where they are to be learned."""
        labels = [token if wanted else IGNORED for token, wanted in zip(ids, learned, strict=True)]
        for name, cell in zip(self.columns, (ids, [1] * len(ids), labels, characters), strict=True):
            self.columns[name].append(cell)


_FLATTERS = "all of them are one and the same token, which is easy to predict and flatters every score"


def _at_the_last(characters: int, tokens: int) -> np.ndarray:
    """A text's length in characters, booked on its last token [tokens]."""
    booked = np.zeros(tokens, dtype=np.int64)
    booked[-1] = characters
    return booked


def _padded(pad: DataCollatorForSeq2Seq, rows: list[dict[str, Any]]) -> Any:
    return pad([{name: cell for name, cell in row.items() if name != CHARACTERS} for row in rows])


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token that opens a text (some models have only one that closes it) and the one that closes it."""
    first, last = cast("int | None", tokenizer.bos_token_id), cast("int | None", tokenizer.eos_token_id)
    end = [] if last is None else [last]
    start = end if first is None else [first]
    return start, end
