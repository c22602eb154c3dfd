"""Words of the command line to values: lists of methods, ranks and batch shapes."""

from __future__ import annotations

import re

import typer

from ranktune.errors import did_you_mean

from .variants import FROZEN, REFERENCE, VARIANTS, Variant


def ranks(text: str) -> list[int]:
    """``"8,64"`` to [8, 64]."""
    words = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise typer.BadParameter(f"{text!r}: give whole numbers from 1, with commas between them, such as 8,64.")
    return [int(word) for word in words]


def shapes(text: str) -> list[tuple[int, int]]:
    """``"16x128,4x512"`` to [(16, 128), (4, 512)]: sequences, and tokens of each."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word) for word in text.split(",")]
    if not all(found):
        raise typer.BadParameter(f"{text!r}: give SEQUENCESxTOKENS, with commas between them, such as 16x128,4x512.")
    return [(int(match[1]), int(match[2])) for match in found if match]


def methods(text: str | None) -> tuple[list[Variant], list[Variant]]:
    """Names to the variants to time and the variants to count; the two that ratios refer to are always among them.

    None chooses the default: what is marked so is timed, or counted.
    """
    if text is None:
        rows = VARIANTS.values()
        return [row for row in rows if row.timed], [row for row in rows if row.counted]
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(VARIANTS)}.{did_you_mean(name, VARIANTS)}")
    chosen = [variant for variant in VARIANTS.values() if variant.name in {FROZEN, REFERENCE, *names}]
    return chosen, chosen
