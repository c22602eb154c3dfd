"""What `ranktune squeeze` shows: a line for each module, and what was lost in all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ranktune.report.exports import left_out_line, saved_in
from ranktune.report.tables import size

if TYPE_CHECKING:
    from ranktune.squeezed_run import SqueezedRun
    from ranktune.squeezing import Squeezed


def squeezed_table(squeezed: Squeezed) -> Table:
    """Each module's rank before and after, and the share of its update's norm that was lost."""
    table = Table(title="Updates", title_justify="left")
    table.add_column("module", overflow="fold")
    for heading in ("out x in", "rank", "norm lost"):
        table.add_column(heading, justify="right")
    for name, (rows, columns) in squeezed.shapes.items():
        ranks = f"{squeezed.ranks_before[name]} to {squeezed.ranks[name]}"
        table.add_row(name, f"{rows} x {columns}", ranks, f"{squeezed.errors[name]:.2%}")
    return table


def squeezed_lines(result: SqueezedRun, folder: Path, trained: Path) -> Iterator[str]:
    """Sizes, what is lost of the updates and of their effect, and where the result is."""
    squeezed = result.squeezed
    before, after = sum(squeezed.ranks_before.values()), sum(squeezed.ranks.values())
    if squeezed.whole:
        yield (
            f"nothing to squeeze: the budget is no less than this adapter has, total rank {before:,} and "
            f"{squeezed.parameters_before:,} numbers in the factors, so every component was kept"
        )
    yield (
        f"total rank {before:,} to {after:,}, {squeezed.parameters_before:,} to {squeezed.parameters:,} numbers in the "
        f"factors, {size(squeezed.nbytes_before)} to {size(squeezed.nbytes)}"
    )
    if squeezed.stored > squeezed.parameters:
        yield (
            f"in the file the factors have {squeezed.stored:,} numbers, with the zeros that the uniform profile fills "
            "them up with; --profile compact has none"
        )
    if beside := list(_beside(squeezed)):
        yield f"beside the factors: {', '.join(beside)}"
    what = " (of their factors; magnitudes are kept)" if squeezed.decomposed else ""
    yield f"lost of the updates' norm: {squeezed.error:.2%}{what}"
    if dropped := [name for name, rank in squeezed.ranks.items() if rank == 0]:
        yield left_out_line(dropped)
    if (loss := result.loss) is not None:
        yield (
            f"lost of what the adapter does to outputs: {loss.share:.2%} on {loss.inputs}, in stock PEFT; largest "
            f"difference {loss.difference:.2g} where the adapter moves an output by up to {loss.effect:.3g}"
        )
    else:
        yield f"outputs were not compared: {result.unknown}"
    yield saved_in(folder, trained)


def _beside(squeezed: Squeezed) -> Iterator[str]:
    """What else `inspect` and a run's summary count as parameters of the adapter."""
    if squeezed.folded > 0:
        yield f"{squeezed.folded:,} gates or scalings, now inside them"
    if squeezed.magnitudes:
        yield f"{squeezed.magnitudes:,} magnitudes, which are kept"
