"""What classification and regression share: one or two texts go in, one vector from a new head comes out."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from ranktune.tasks.base import Task, check_length, positions
from ranktune.tasks.tokenization import map_examples

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextInputTask(Task):
    """A task whose model reads `text` (and `text_pair`) and answers with one vector per example."""

    peft_task_type: ClassVar[str] = "SEQ_CLS"

    def load_model(
        self,
        path: str,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        quantization_config: Any = None,
    ) -> PreTrainedModel:
        """Load the encoder with a new head of the right width.

        Raises RecipeError when `max_length` is too long.
        """
        revision = revision or "main"
        config = AutoConfig.from_pretrained(path, revision=revision, **self._head())
        check_length("data.max_length", self.max_length, positions(config), "model")
        if config.pad_token_id is None:
            # Decoders (GPT-2, Llama) find each row's last real token by this number, and need it for batches.
            config.pad_token_id = self.load_tokenizer(path, revision).pad_token_id
        return AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=dtype, revision=revision, quantization_config=quantization_config
        )

    def tokenize(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Token ids of the text or pair, cut to `max_length`, and the label."""
        check_length("data.max_length", self.max_length, tokenizer.model_max_length, "tokenizer")

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(
                rows["text"], text_pair=rows.get("text_pair"), truncation=True, max_length=self.max_length
            )
            return {**encoded, "labels": rows["label"]}

        return map_examples(dataset, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> DataCollatorWithPadding:  # noqa: ARG002
        """Pad to the longest example of the batch."""
        return DataCollatorWithPadding(tokenizer)

    @abstractmethod
    def _head(self) -> dict[str, Any]:
        """Return the configuration fields that shape the new head."""
