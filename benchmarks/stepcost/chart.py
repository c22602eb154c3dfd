"""The comparison as a bar chart: step time and bytes kept for backward, both relative to PEFT LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ranktune.report.style import GREY, dress, save

from .cases import BytesRow, TimeRow
from .variants import FROZEN, VARIANTS

# Okabe and Ito's palette in the table's order; the rows after the last colour start again, hatched, and again.
_PALETTE = ("#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73")
_HATCHES = (None, "///", "...")

# A bar: its height, and how far below and above it the quartiles are.
Bar = tuple[float, float, float]


def draw(times: Sequence[TimeRow], counts: Sequence[BytesRow], path: Path) -> None:
    """Write the chart as PNG; a part that was not measured is left out."""
    panels = {
        "Time of one training step of an encoder": _time_bars(times),
        "Kept for backward per token of a Llama block": _byte_bars(counts),
    }
    panels = {title: groups for title, groups in panels.items() if groups}
    cases = [len(groups) for groups in panels.values()]
    figure = Figure(figsize=(1.5 + 2.2 * sum(cases), 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=cases)[0]
    for axes, (title, groups) in zip(all_axes, panels.items(), strict=True):
        _grouped_bars(axes, groups)
        dress(axes, title, "", "ratio to PEFT LoRA")
    shown = {name for groups in panels.values() for bars in groups.values() for name in bars}
    handles = [_legend_patch(name) for name in VARIANTS if name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(panels), frameon=False)
    save(figure, path)


def _time_bars(rows: Sequence[TimeRow]) -> dict[str, dict[str, Bar]]:
    """Case to variant to bar."""
    bars: dict[str, dict[str, Bar]] = {}
    for row in rows:
        spread = row.step_to_reference
        bar = (spread.median, spread.median - spread.low, spread.high - spread.median)
        bars.setdefault(f"{row.batch} x {row.tokens}\nr = {row.r}", {})[row.variant] = bar
    return bars


def _byte_bars(rows: Sequence[BytesRow]) -> dict[str, dict[str, Bar]]:
    bars: dict[str, dict[str, Bar]] = {}
    for row in rows:
        bars.setdefault(f"dropout {row.dropout:g}\nr = {row.r}", {})[row.variant] = (row.per_token_to_reference, 0, 0)
    return bars


def _grouped_bars(axes: Axes, groups: dict[str, dict[str, Bar]]) -> None:
    """A group of bars per case, side by side, each with its value above and its quartiles as a whisker."""
    names = [name for name in VARIANTS if any(name in bars for bars in groups.values())]
    width = 0.86 / len(names)
    for place, name in enumerate(names):
        centres = [group + (place - (len(names) - 1) / 2) * width for group in range(len(groups))]
        bars = [group[name] for group in groups.values()]
        heights = [height for height, _, _ in bars]
        spread = [[below for _, below, _ in bars], [above for _, _, above in bars]]
        colour, hatch = look(name)
        axes.bar(centres, heights, width * 0.92, color=colour, hatch=hatch)
        if any(map(any, spread)):
            axes.errorbar(centres, heights, spread, fmt="none", ecolor="#333333", elinewidth=1)
        for centre, (height, _, above) in zip(centres, bars, strict=True):
            axes.annotate(
                f"{height:.2f}", (centre, height + above), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    axes.axhline(1.0, color="#333333", linewidth=0.8, linestyle="--", zorder=0.5)
    axes.set_xticks(range(len(groups)), groups)


def _legend_patch(name: str) -> Patch:
    colour, hatch = look(name)
    return Patch(facecolor=colour, hatch=hatch, label=VARIANTS[name].label)


def look(name: str) -> tuple[str, str | None]:
    """A variant's colour and hatch, the same whichever others are shown."""
    if name == FROZEN:
        return GREY, None
    place = [other for other in VARIANTS if other != FROZEN].index(name)
    return _PALETTE[place % len(_PALETTE)], _HATCHES[place // len(_PALETTE)]
