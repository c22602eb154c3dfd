"""Sequence to sequence: one text in, one text out, scored on what the model generates greedily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from ranktune.errors import RecipeError
from ranktune.tasks.base import Data, Task, check_length, first_output, positions
from ranktune.tasks.edit_distance import edit_distance
from ranktune.tasks.tokenization import map_examples
from ranktune.tasks.unknown import UnknownTokens, unknown_id

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from ranktune.recipe import DataRecipe

IGNORED = -100  # a label that no loss counts; the trainer pads predictions with it too


class Seq2Seq(Task):
    """Generate `target` from `source_text`.

    A target longer than `max_target_length` is refused, never cut. A target with a character that the vocabulary
    does not have can never be met exactly, and that is what the scores say.
    """

    name: ClassVar[str] = "seq2seq"
    peft_task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    trainer_class = Seq2SeqTrainer
    arguments_class = Seq2SeqTrainingArguments

    def __init__(self, recipe: DataRecipe, data: Data) -> None:
        super().__init__(recipe, data)
        self.max_target_length = recipe.max_target_length
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def training_arguments(self) -> dict[str, Any]:
        """Generate during evaluation, greedily: a beam search would cost as many times more."""
        return {
            "predict_with_generate": True,
            "generation_max_length": self.max_target_length + 1,  # the decoder's start token counts too
            "generation_num_beams": 1,
        }

    def load_model(
        self,
        path: str,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        quantization_config: Any = None,
    ) -> PreTrainedModel:
        """Load the encoder-decoder. Raises RecipeError when a length is more than its positions."""
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
        check_length("data.max_length", self.max_length, positions(config), "model")
        check_length("data.max_target_length", self.max_target_length, positions(config), "model")
        model = AutoModelForSeq2SeqLM.from_pretrained(
            path, dtype=dtype, revision=revision or "main", quantization_config=quantization_config
        )
        # Only the special tokens of the model's own generation settings: sampling would make scores random,
        # and a summariser's minimal length or ban on repeats is wrong for another task.
        own = model.generation_config.to_dict() if model.generation_config else {}
        model.generation_config = GenerationConfig(**{k: v for k, v in own.items() if k.endswith("_token_id")})
        return model

    def tokenize(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Return ids of the source, cut to `max_length`, and of the target; `compute_metrics` decodes with
        this tokenizer. Raises RecipeError when a target is too long.
        """
        check_length("data.max_length", self.max_length, tokenizer.model_max_length, "tokenizer")
        self._tokenizer = tokenizer
        unknown = UnknownTokens(tokenizer)

        def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
            encoded = tokenizer(rows["source_text"], truncation=True, max_length=self.max_length)
            labels = tokenizer(text_target=rows["target"], verbose=False)["input_ids"]
            for ids, target in zip(labels, rows["target"], strict=True):
                unknown.count(target, ids)
                if len(ids) > self.max_target_length:
                    raise RecipeError(
                        f"data.max_target_length: the target '{target[:40]}...' takes {len(ids)} tokens, more than "
                        f"{self.max_target_length}. Set {len(ids)} or more, or shorten it."
                    )
            return {**encoded, "labels": labels}

        tokenized = map_examples(dataset, encode)
        unknown.warn("targets", "the model can never write them, so these targets always count as missed")
        return tokenized

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> DataCollatorForSeq2Seq:
        """Pad to the longest source and target of the batch, the labels with -100."""
        return DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Pass the generated ids [batch, tokens] on: they are small already."""
        return first_output(logits)

    def compute_metrics(self, prediction: EvalPrediction, examples: datasets.Dataset) -> dict[str, float]:  # noqa: ARG002
        """Return the share of targets generated exactly, and edits per character of the targets."""
        generated = self._decode(prediction.predictions, unknown="\ufffe")
        targets = self._decode(prediction.label_ids, unknown="\uffff")
        pairs = list(zip(generated, targets, strict=True))
        return {
            "exact_match": sum(first == second for first, second in pairs) / len(pairs),
            "character_error_rate": sum(edit_distance(*pair) for pair in pairs) / max(1, sum(map(len, targets))),
        }

    def _decode(self, ids: Any, unknown: str) -> list[str]:
        """Decode ids [rows, tokens], -100 as padding.

        The unknown token stands for any character that the vocabulary lacks, so two of them are not known to be
        equal: each becomes `unknown`, which is to differ between the two sides that are compared.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RuntimeError("Seq2Seq.compute_metrics needs the tokenizer: call tokenize first.")
        known = np.array(ids)
        known[known == IGNORED] = tokenizer.pad_token_id
        texts = tokenizer.batch_decode(known, skip_special_tokens=True)
        is_unknown = known == unknown_id(tokenizer)
        for row in np.flatnonzero(is_unknown.any(axis=1)):
            first, *others = np.split(known[row], np.flatnonzero(is_unknown[row]))
            pieces = [first.tolist(), *(piece[1:].tolist() for piece in others)]
            texts[row] = unknown.join(tokenizer.batch_decode(pieces, skip_special_tokens=True))
        return [text.strip() for text in texts]
