"""Run a tokenizer over a data set, quietly and without leaving cache files that could be stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ranktune.tasks.quiet import quiet_datasets

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def map_examples(
    dataset: datasets.Dataset, encode: Callable[[dict[str, list[Any]]], dict[str, Any]]
) -> datasets.Dataset:
    """Return `encode` applied to batches of rows (column -> values), with the original columns dropped."""
    return map_rows(dataset, encode, remove_columns=dataset.column_names)


def map_rows(
    dataset: datasets.Dataset,
    change: Callable[[dict[str, list[Any]]], dict[str, Any]],
    remove_columns: list[str] | None = None,
) -> datasets.Dataset:
    """Return the data set with the columns that `change` makes of a batch of rows (column -> values).

    Nothing is read from or written to the cache of `datasets`: its key is a pickle of the tokenizer, whose
    state changes as it is used.
    """
    with quiet_datasets():
        return dataset.map(
            change,
            batched=True,
            remove_columns=remove_columns,
            keep_in_memory=True,
            load_from_cache_file=False,
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of every text, whole and without special tokens."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]
