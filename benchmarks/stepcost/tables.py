"""The comparison as tables for the terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from .cases import BytesRow, TimeRow
from .timing import Spread
from .variants import VARIANTS


def time_table(rows: Sequence[TimeRow]) -> Table:
    """One case: a row per variant."""
    first = rows[0]
    table = _table(
        f"\nOne training step, {first.batch} x {first.tokens} tokens, r = {first.r}",
        ["fwd+bwd\nms", "step\nms", "step\n/ frozen", "step / PEFT\nLoRA", "its\nquartiles", "fwd+bwd /\nPEFT LoRA"],
    )
    for row in rows:
        table.add_row(
            VARIANTS[row.variant].label,
            _milliseconds(row.forward_backward),
            _milliseconds(row.step),
            f"{row.step_to_frozen.median:.3f}",
            f"{row.step_to_reference.median:.3f}",
            f"{row.step_to_reference.low:.2f}-{row.step_to_reference.high:.2f}",
            f"{row.forward_backward_to_reference.median:.3f}",
        )
    table.caption = "\n".join(_speedup(row, row.stock_to_step) for row in rows if row.stock_to_step is not None)
    return table


def bytes_table(rows: Sequence[BytesRow]) -> Table:
    """All cases: a row per variant, a group of columns per dropout."""
    first = rows[0]
    dropouts = list(dict.fromkeys(row.dropout for row in rows))
    table = _table(
        f"Kept for backward by one Llama block, {first.width} wide, r = {first.r}",
        [
            heading
            for dropout in dropouts
            for heading in (f"KiB/token\np = {dropout:g}", "/ PEFT\nLoRA", "besides\nKiB")
        ],
    )
    for name in dict.fromkeys(row.variant for row in rows):
        cells = [VARIANTS[name].label]
        for row in (row for dropout in dropouts for row in rows if (row.variant, row.dropout) == (name, dropout)):
            kept, besides = row.saved.per_token / 1024, row.saved.constant / 1024
            cells += [f"{kept:.2f}", f"{row.per_token_to_reference:.3f}", f"{besides:.0f}"]
        table.add_row(*cells)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, caption_justify="left", padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _speedup(row: TimeRow, ratio: Spread) -> str:
    variant = VARIANTS[row.variant]
    stock = VARIANTS[variant.stock or variant.name].label
    return f"{variant.label} is {ratio.median:.2f} times as fast as {stock} ({ratio.low:.2f}-{ratio.high:.2f})"


def _milliseconds(seconds: Spread) -> str:
    return f"{seconds.median * 1e3:.1f}"
