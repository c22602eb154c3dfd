"""An order of module names that is the model's in the usual architectures, for files that do not tell theirs.

Safetensors files list their tensors by the alphabet: layer 10 before layer 2, and keys before queries.
"""

from __future__ import annotations

from collections.abc import Iterable

# Parts of names that stand, in the usual models, before others that the alphabet has earlier.
_FIRST = (
    "model",
    "transformer",
    "encoder",
    "decoder",
    "attention",
    "attn",
    "self",
    "self_attn",
    "SelfAttention",
    "encoder_attn",
    "query",
    "q_proj",
    "q",
    "key",
    "k_proj",
    "k",
    "value",
    "v_proj",
    "v",
    "gate_proj",
    "up_proj",
)
_PLACES = {part: place for place, part in enumerate(_FIRST)}


def in_usual_order(names: Iterable[str]) -> list[str]:
    """Layers by number, attention before what follows it, queries before keys before values, the rest by name."""
    return sorted(names, key=_key)


def _key(name: str) -> list[tuple[bool, int, str]]:
    """Parts of a name that compare by number where they are numbers."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else _PLACES.get(part, len(_PLACES)), part)
        for part in name.split(".")
    ]
