"""Levenshtein distance between two texts, one vectorised row at a time."""

from __future__ import annotations

import numpy as np


def edit_distance(first: str, second: str) -> int:
    """Return the fewest characters to insert, delete or replace to turn one text into the other."""
    letters = np.array(list(second))
    positions = np.arange(len(second) + 1)
    row = positions
    for deleted, letter in enumerate(first, start=1):
        replaced = row[:-1] + (letters != letter)
        best = np.concatenate(([deleted], np.minimum(row[1:] + 1, replaced)))
        # Insertions run along the row: row[j] = min over i <= j of best[i] + (j - i).
        row = np.minimum.accumulate(best - positions) + positions
    return int(row[-1])
