"""`data.replace`: other characters for those that a model's vocabulary does not have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def replacer(table: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that puts `table[found]` for every `found` in a text.

    In one pass, so that two characters can change places, and the longest first where several begin alike.
    """
    pattern = re.compile("|".join(re.escape(found) for found in sorted(table, key=len, reverse=True)))
    return lambda text: pattern.sub(lambda match: table[match.group()], text)
