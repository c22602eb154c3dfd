"""A tokenizer for models that come with two tables of characters instead of one: spelling in, sounds out.

The grapheme-to-phoneme models of misaki list them in their config.json: `grapheme_chars` for what they read and
`phoneme_chars` for what they write, each character's place being its number. The same number means one character in
the one table and another in the other, which no ordinary tokenizer file can say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizer

from ranktune.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SPECIAL_COUNT = 4  # both tables begin with as many placeholders, for the special tokens


class CharacterTokenizer(PreTrainedTokenizer):
    """One token per character; texts are read by one table, targets (`text_target`) and decoding by the other.

    Args:
        reads: the characters of a source, each at the place of its number.
        writes: those of a target.
        special_ids: special token -> its number.
        special: which of them is the `pad_token`, `bos_token`, `eos_token`, `unk_token`.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, reads: str, writes: str, special_ids: dict[str, int], **special: Any) -> None:
        self._special_ids = special_ids
        self._read_ids = _numbered(reads)
        self._write_ids = _numbered(writes)
        self._written = {number: character for character, number in self._write_ids.items()}
        self._current = self._read_ids
        special.setdefault("special_tokens_pattern", "bos_eos")
        super().__init__(reads=reads, writes=writes, special_ids=special_ids, **special)

    @property
    def vocab_size(self) -> int:
        """How many numbers there are."""
        return 1 + max(*self._read_ids.values(), *self._write_ids.values(), *self._special_ids.values())

    def get_vocab(self) -> dict[str, int]:
        """Character (or special token) of the table in use -> number."""
        return {**self._special_ids, **self._current}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:  # noqa: ARG002
        """Nothing to write: both tables stand in tokenizer_config.json."""
        return ()

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._special_ids.get(token, self._current.get(token, self._special_ids[str(self.unk_token)]))

    def _convert_id_to_token(self, index: int) -> str:
        return self._written.get(index, str(self.unk_token))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The characters side by side."""
        return "".join(tokens)

    def _switch_to_input_mode(self) -> None:
        self._current = self._read_ids

    def _switch_to_target_mode(self) -> None:
        self._current = self._write_ids


def character_tokenizer(config: PretrainedConfig) -> CharacterTokenizer | None:
    """The tokenizer of a model whose configuration lists its characters, None for every other model.

    Raises:
        RecipeError: the lists do not fit the rest of the configuration.
    """
    reads, writes = getattr(config, "grapheme_chars", None), getattr(config, "phoneme_chars", None)
    if not isinstance(reads, str) or not isinstance(writes, str):
        return None
    numbers = {"<pad>": config.pad_token_id, "<s>": config.bos_token_id, "</s>": config.eos_token_id}
    free = [number for number in range(_SPECIAL_COUNT) if number not in numbers.values()]
    if len(free) != 1 or None in numbers.values() or max(len(reads), len(writes)) > config.vocab_size:
        raise RecipeError(
            f"model: its config.json lists {len(reads)} characters to read and {len(writes)} to write for a vocabulary "
            f"of {config.vocab_size}, with the special tokens {numbers}; three of the numbers 0 to 3 are expected."
        )
    return CharacterTokenizer(
        reads,
        writes,
        {**numbers, "<unk>": free[0]},
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _numbered(characters: str) -> dict[str, int]:
    return {character: number for number, character in enumerate(characters) if number >= _SPECIAL_COUNT}
