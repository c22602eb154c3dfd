"""What the interactive figures and the pictures of a comparison share: a method's mark, its words, and their scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ranktune.compare.summary import MethodSummary, Summary
from ranktune.report.style import BLUE, GREEN, GREY, ORANGE

# Okabe and Ito's, and a shape each: methods are told apart without colour too. Eight colours and nine shapes make 72
# pairs before one comes again; lines of one colour differ in their dashes.
_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000", GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon")
_MARKERS = "osD^vPX*p"
_DASHES = ("solid", "dash", "dot", "dashdot")
_LINES = ("-", "--", ":", "-.")

# Trained parameters that differ by more than this factor are drawn in another panel: on one axis with full fine-tuning
# all adapters would be one point.
_APART = 2.0
# Losses that differ by more are drawn on a logarithmic axis: beside a method that went astray the others would be one.
_ASTRAY = 100.0


@dataclass(frozen=True)
class Mark:
    """How a method is drawn: `symbol` and `dash` in plotly's words, `marker` and `line` in matplotlib's."""

    colour: str
    symbol: str
    dash: str
    marker: str
    line: str


def marks(summary: Summary) -> dict[str, Mark]:
    """Each method's, the same in every figure."""
    return {
        method.label: Mark(
            colour=_COLOURS[number % len(_COLOURS)],
            symbol=_SYMBOLS[number % len(_SYMBOLS)],
            dash=_DASHES[number // len(_COLOURS) % len(_DASHES)],
            marker=_MARKERS[number % len(_MARKERS)],
            line=_LINES[number // len(_COLOURS) % len(_LINES)],
        )
        for number, method in enumerate(summary.methods)
    }


def scored(summary: Summary) -> list[MethodSummary]:
    """The methods that have a score."""
    return [method for method in summary.methods if method.interval is not None]


def metric_words(summary: Summary) -> str:
    """The metric's name as a reader wants it."""
    return summary.metric.replace("_", " ")


def trouble_words(method: MethodSummary) -> str:
    """What keeps the method from having all of its scores, short; empty where nothing does."""
    words = [f"{count} {status}" for status, count in sorted(Counter(method.lost.values()).items())]
    if method.waiting:
        searched = ", its search among them" if method.rate is None else ""
        words.append(f"{method.waiting} not trained yet{searched}")
    elif method.rate is None:
        words.append("no usable learning rate")
    return ", ".join(words)


def parameter_panels(methods: list[MethodSummary]) -> list[list[MethodSummary]]:
    """The methods by rising number of trained parameters, in the panels they are drawn in: one or two.

    Two where that number makes one jump, each with a linear axis of its own; with more jumps there is one panel, whose
    axis is logarithmic (`spread_out`).
    """
    panels: list[list[MethodSummary]] = []
    for method in sorted(methods, key=lambda method: method.trainable or 0.0):
        if panels and (method.trainable or 0.0) <= _APART * (panels[-1][-1].trainable or 0.0):
            panels[-1].append(method)
        else:
            panels.append([method])
    return panels if len(panels) <= 2 else [[method for panel in panels for method in panel]]


def spread_out(panel: list[MethodSummary]) -> bool:
    """Whether the panel's numbers of parameters want a logarithmic axis."""
    counts = [method.trainable or 1.0 for method in panel]
    return max(counts) > 2 * _APART * min(counts)


def panel_range(panel: list[MethodSummary]) -> tuple[float, float]:
    """Bounds of a panel's axis, with room at both sides; equal numbers do not become a microscope."""
    counts = [method.trainable or 1.0 for method in panel]
    low, high = min(counts), max(counts)
    if spread_out(panel):
        return low / 1.5, high * 1.5
    room = max(0.1 * (high - low), 0.01 * high)
    return low - room, high + room


def front_steps(panel: list[MethodSummary], reached: float | None) -> list[tuple[float, float]]:
    """The Pareto front over a panel from edge to edge, as corners of steps: the best mean that so many parameters give.

    `reached` is that at the left edge, None where there is nothing smaller than the panel.
    """
    low, high = panel_range(panel)
    steps = [] if reached is None else [(low, reached)]
    front = [method for method in panel if method.on_front]
    steps += [(method.trainable or 0.0, method.interval.mean) for method in front if method.interval]
    return [*steps, (high, steps[-1][1])] if steps else []


def scores_astray(summary: Summary) -> bool:
    """Whether the scores want a logarithmic axis: losses of which some are beyond all measure."""
    scores = [score for method in summary.methods for score in method.scores.values()]
    return bool(scores) and not summary.greater_is_better and min(scores) > 0 and max(scores) > _ASTRAY * min(scores)
