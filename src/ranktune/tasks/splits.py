"""Splits that are the same everywhere.

Evaluation by a hash of the text, samples by seed, a fingerprint of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from ranktune.errors import DataError

if TYPE_CHECKING:
    import datasets


def split_off(texts: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Return the rows of the training and of the evaluation split, each in order.

    The rows with the smallest hash of their text go to evaluation until there are `fraction` of them (at
    least one). Equal texts have equal hashes and stay together, so none is in both. Raises DataError when
    nothing is left to train on.
    """
    hashes = [_hash(text) for text in texts]
    wanted = max(1, round(fraction * len(texts)))
    limit = sorted(hashes)[wanted - 1]
    evaluation = [row for row, digest in enumerate(hashes) if digest <= limit]
    train = [row for row, digest in enumerate(hashes) if digest > limit]
    if not train:
        raise DataError(
            f"data.evaluation_fraction: {len(texts)} examples with {len(set(texts))} different texts cannot be "
            "split into training and evaluation. Give more examples or a split of your own (data.evaluation)."
        )
    return train, evaluation


def sample(dataset: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """Return at most `limit` rows, drawn without order by `seed` but kept in order."""
    if limit is None or limit >= len(dataset):
        return dataset
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit])
    return dataset.select(rows.tolist())


def fingerprint(splits: Iterable[datasets.Dataset]) -> str:
    """Return a hash of every row of every split, in order: equal only for equal data."""
    digest = blake2b(digest_size=16)
    for split in splits:
        digest.update(json.dumps([split.column_names, len(split)]).encode())
        for rows in split.iter(batch_size=1000):
            digest.update(json.dumps(rows, sort_keys=True).encode())
    return digest.hexdigest()


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()
