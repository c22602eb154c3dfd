"""Remove near-duplicate texts exactly: no two texts that are kept share half of their word pairs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Return the lower-case words of `text`, without punctuation.

    Two texts with equal words count as equal.
    """
    return _WORD.findall(text.lower())


def similarity(first: str, second: str) -> float:
    """Return the Jaccard similarity of the two texts' sets of neighbouring word pairs, from 0 to 1."""
    return _jaccard(_pairs(first), _pairs(second))


def distinct(texts: Sequence[str], threshold: float = 0.5) -> list[int]:
    """Return the positions of `texts` to keep, in order: the first of every group of near-duplicates.

    A text goes when its `similarity` to an earlier kept one is at least `threshold`. The search is exact, not
    by random hashing: a set of n pairs that reaches the threshold with another one must share at least one of
    its n - ceil(threshold n) + 1 rarest pairs with it (the prefix filter of Chaudhuri 2006), so only those
    are looked up.
    """
    sets = [_pairs(text) for text in texts]
    frequency = Counter(pair for pairs in sets for pair in pairs)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    kept = []
    for position, pairs in enumerate(sets):
        rarest_first = sorted(pairs, key=lambda pair: (frequency[pair], pair))
        prefix = rarest_first[: len(pairs) - ceil(threshold * len(pairs)) + 1]
        candidates = dict.fromkeys(earlier for pair in prefix for earlier in holders.get(pair, ()))
        if any(_jaccard(sets[earlier], pairs) >= threshold for earlier in candidates):
            continue
        for pair in prefix:
            holders[pair].append(position)
        kept.append(position)
    return kept


def _pairs(text: str) -> set[str]:
    found = words(text)
    return {" ".join(found[start : start + 2]) for start in range(max(1, len(found) - 1))}


def _jaccard(first: set[str], second: set[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
