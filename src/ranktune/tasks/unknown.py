"""Characters that a model's vocabulary does not have: counted where they would spoil a score, and told once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("ranktune")

_SHOWN = 8  # different characters that the message names
_LOOKED_AT = 50  # texts in which they are looked for


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of the unknown token; None where nothing is unknown, or where another special token plays its part.

    Byte-level vocabularies know everything, and GPT-2 names its end of text here.
    """
    number = cast("int | None", tokenizer.unk_token_id)
    return None if number in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) else number


class UnknownTokens:
    """Counts the unknown tokens of texts, and warns once about all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._unknown = unknown_id(tokenizer)
        self._tokens = self._of_them_unknown = 0
        self._with_unknown: list[tuple[str, list[int]]] = []

    def count(self, text: str, ids: list[int]) -> None:
        """Look at one text and its token ids."""
        found = 0 if self._unknown is None else ids.count(self._unknown)
        self._tokens += len(ids)
        self._of_them_unknown += found
        if found and len(self._with_unknown) < _LOOKED_AT:
            self._with_unknown.append((text, ids))

    def warn(self, what: str, consequence: str) -> None:
        """Log how many of `what` are unknown, which they are, and what follows; nothing when there are none."""
        if not self._of_them_unknown:
            return
        pieces = dict.fromkeys(piece for text, ids in self._with_unknown for piece in self._unknown_pieces(text, ids))
        names = ", ".join(repr(piece) for piece in list(pieces)[:_SHOWN]) or f"in {self._with_unknown[0][0][:40]!r}"
        logger.warning(
            "data: %d of %d tokens in the %s (%.1f %%) are unknown to the model's vocabulary: %s%s; %s. data.replace "
            "can put characters that it knows in their place.",
            self._of_them_unknown,
            self._tokens,
            what,
            100 * self._of_them_unknown / self._tokens,
            names,
            ", ..." if len(pieces) > _SHOWN else "",
            consequence,
        )

    def _unknown_pieces(self, text: str, ids: list[int]) -> list[str]:
        """The parts of a text that became unknown tokens; none where the tokenizer does not tell."""
        if self._tokenizer.is_fast:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            return [text[first:last] for token, (first, last) in places if token == self._unknown]
        own = [token for token in ids if token == self._unknown or token not in self._tokenizer.all_special_ids]
        if len(own) != len(text):
            return []
        return [character for character, token in zip(text, own, strict=True) if token == self._unknown]
