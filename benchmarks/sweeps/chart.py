"""One picture per axis: a line per variant, both scales logarithmic."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ranktune.report.style import dress
from stepcost.chart import look
from stepcost.variants import REFERENCE, VARIANTS

from .tables import Panel, told

_LINES = {None: "-", "///": "--", "...": "-."}
_MARKERS = "osD^vPX"
# How far a line stands beside the one before it, in widths of the picture.
_ASIDE = 0.003
_TICKS = tuple(digit * 10.0**power for power in range(-4, 6) for digit in (1, 1.5, 2, 3, 5, 7))


def sweep_figure(record: dict[str, Any]) -> Figure:
    """The picture of one sweep; a part that was not measured is left out."""
    panels = told(record)
    figure = Figure(figsize=(1.2 + 5.4 * len(panels), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    shown: set[str] = set()
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = record[panel.part]["rows"]
        names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
        for place, name in enumerate(names):
            _draw_line(axes, panel, name, [row for row in rows if row["variant"] == name], place - len(names) / 2)
        shown.update(names)
        _set_scales(axes, sorted({row["value"] for row in rows}))
        dress(axes, panel.title, record["label"], panel.unit)
    rest = ", ".join(f"{name} {value:,}" for name, value in record["fixed"].items())
    figure.suptitle(f"By {record['label']}; the rest stays: {rest}", x=0.01, ha="left", fontsize=10)
    figure.legend(
        handles=[_legend_line(name) for name in VARIANTS if name in shown],
        loc="outside lower center",
        ncols=3 + len(panels) - 1,
        frameon=False,
    )
    return figure


def _draw_line(axes: Axes, panel: Panel, name: str, rows: list[dict[str, Any]], place: float) -> None:
    """A variant's line, with its quartiles where it has some; a little to the side, so that these do not overlap."""
    spreads = [_spread(row[panel.key], panel.factor) for row in rows]
    values = [row["value"] for row in rows]
    x = [value * (max(values) / min(values)) ** (_ASIDE * place) for value in values]
    middle = [median for median, _, _ in spreads]
    away = [[median - low for median, low, _ in spreads], [high - median for median, _, high in spreads]]
    axes.plot(x, middle, **_style(name))
    if name != REFERENCE:
        axes.errorbar(x, middle, away, fmt="none", ecolor=_style(name)["color"], elinewidth=1)


def _spread(figure: float | dict[str, float], factor: float) -> tuple[float, float, float]:
    """Median, low and high of a figure, which may be exact."""
    if isinstance(figure, dict):
        return figure["median"] * factor, figure["low"] * factor, figure["high"] * factor
    return figure * factor, figure * factor, figure * factor


def _style(name: str) -> dict[str, Any]:
    """Of a variant's line, the same in every picture."""
    if name == REFERENCE:
        return {"color": "#333333", "linestyle": ":", "linewidth": 1.2}
    colour, hatch = look(name)
    marker = _MARKERS[list(VARIANTS).index(name) % len(_MARKERS)]
    return {"color": colour, "linestyle": _LINES[hatch], "marker": marker, "markersize": 5, "linewidth": 1.5}


def _legend_line(name: str) -> Line2D:
    return Line2D([], [], label=VARIANTS[name].label, **_style(name))


def _set_scales(axes: Axes, values: list[int]) -> None:
    """The measured values are the ticks of x; those of y are numbers that people say."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low * 0.95, high * 1.05)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low * 0.95 <= tick <= high * 1.05]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
