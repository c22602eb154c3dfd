"""A nested adapter in tables and pictures: quality at every rank, and how often each rank was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter
from rich.table import Table

from ranktune.report.exports import agreement_line
from ranktune.report.style import BLUE, GREEN, GREY, dress, new_figure
from ranktune.report.tables import number, size

if TYPE_CHECKING:
    from ranktune.rank_curve import RankCurve
    from ranktune.truncation import Spending, Truncated

# So many labels fit on the rank axis; more are thinned out.
_LABELLED_RANKS = 16


def rank_curve_table(curve: RankCurve) -> Table:
    """One row a rank, the best one bold: what it scores and what it weighs."""
    table = Table(title_justify="left", caption_justify="left")
    table.add_column("rank", justify="right")
    for name in curve.points[0].scores:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("adapter file", justify="right")
    for point in curve.points:
        scores = [number(value) for value in point.scores.values()]
        style = "bold" if point is curve.best else None
        table.add_row(str(point.rank), *scores, f"{point.parameters:,}", size(point.adapter_bytes), style=style)
    return table


def rank_curve_figure(curve: RankCurve, title: str) -> Figure:
    """The main score at every rank, with the best one as a line to compare with; ranks are spaced by their ratios."""
    figure, axes = new_figure(7.2, 4.2)
    ranks = [point.rank for point in curve.points]
    axes.axhline(curve.value(curve.best), color=GREY, linewidth=0.8, linestyle="--")
    axes.plot(ranks, [curve.value(point) for point in curve.points], color=GREEN, marker="o", clip_on=False, zorder=3)
    axes.set_xscale("log", base=2)
    every = -(-len(ranks) // _LABELLED_RANKS)
    axes.xaxis.set_major_locator(FixedLocator(ranks[::-1][::every]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    dress(axes, title, "rank", curve.metric.replace("_", " "))
    axes.margins(y=0.2)
    return figure


def drawn_figure(steps: Mapping[int, int], title: str) -> Figure:
    """How many optimizer steps trained each rank."""
    figure, axes = new_figure(7.2, 4.2)
    ranks = range(len(steps))
    axes.bar(ranks, list(steps.values()), color=BLUE)
    every = -(-len(steps) // _LABELLED_RANKS)
    axes.set_xticks(ranks[::every], [str(rank) for rank in steps][::every])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, title, "rank", "optimizer steps")
    return figure


def spending_table(spending: Spending, parameters: int) -> Table:
    """The score of the chosen ranks, beside one rank for all modules and the whole adapter."""
    ranks = spending.ranks.values()
    table = Table()
    table.add_column(f"at most {spending.budget:,} parameters")
    table.add_column("parameters", justify="right")
    table.add_column(f"{spending.metric.replace('_', ' ')}, {spending.split} split", justify="right")
    own = f"ranks {min(ranks)} to {max(ranks)}, by {spending.by}"
    table.add_row(own, f"{parameters:,}", number(spending.score))
    uniform = f"rank {spending.uniform_rank} everywhere"
    table.add_row(uniform, f"{spending.uniform_parameters:,}", number(spending.uniform_score))
    table.add_row("the whole adapter", f"{spending.full_parameters:,}", number(spending.full_score))
    return table


def truncated_lines(result: Truncated) -> list[str]:
    """What was written, the proof, and how much its score can be trusted."""
    size_of_file = size(result.written.exported.nbytes)
    ranks = f"Rank {result.rank}" if result.spending is None else f"Ranks up to {result.rank}"
    lines = [f"{ranks}: {result.parameters:,} parameters, {size_of_file}, in {result.folder}"]
    lines.append(f"{agreement_line(result.written.agreement)}, with stock PEFT {result.written.agreement.peft}")
    if result.curve is not None:
        lines.append(
            f"The rank was chosen on the {result.curve.split} split out of {len(result.curve.points)}, so its score "
            "there is optimistic: report one on data that chose nothing."
        )
    if result.spending is not None and result.spending.by == "loss":
        lines.append(
            f"The ranks were chosen on the {result.spending.split} split, so their score there is optimistic: report "
            "one on data that chose nothing."
        )
    return lines
