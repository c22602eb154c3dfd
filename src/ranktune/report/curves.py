"""Curves over training steps: the loss, and the metric that the task is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ranktune.report.style import BLUE, GREEN, ORANGE, dress, new_figure

Event = dict[str, Any]


def loss_figure(events: Sequence[Event], title: str) -> Figure:
    """The training loss as logged, and the loss on the evaluation split where it was scored."""
    figure, axes = new_figure(7.2, 4.2)
    _line(axes, _points(events, "step", "loss"), "training", BLUE)
    _line(axes, _points(events, "evaluation", "loss"), "evaluation", ORANGE, marker="o")
    dress(axes, title, "optimizer step", "loss")
    _finish(axes)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def metric_figure(events: Sequence[Event], metric: str, title: str) -> Figure:
    """The main metric at every evaluation, the first and the last with their values."""
    figure, axes = new_figure(7.2, 4.2)
    points = _points(events, "evaluation", metric)
    _line(axes, points, metric, GREEN, marker="o")
    dress(axes, title, "optimizer step", metric.replace("_", " "))
    if points:
        _label(axes, points[0], points[min(1, len(points) - 1)], side=1)
    if len(points) > 1:
        _label(axes, points[-1], points[-2], side=-1)
    axes.margins(y=0.2)
    _finish(axes)
    return figure


def _points(events: Sequence[Event], kind: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of one kind of event, in order, the last one where a step has several; no nan or infinity."""
    found = {event["step"]: event[field] for event in events if event["event"] == kind and event.get(field) is not None}
    return sorted(found.items())


def _line(axes: Axes, points: list[tuple[int, float]], label: str, color: str, marker: str | None = None) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        # A single point has no line: without a marker it would be invisible.
        marker = marker or ("o" if len(points) == 1 else None)
        axes.plot(steps, values, color=color, label=label, marker=marker, clip_on=False, zorder=3)


def _label(axes: Axes, point: tuple[int, float], neighbour: tuple[int, float], side: int) -> None:
    """Write a point's value on its right (side 1) or left (-1), away from the line to its neighbour."""
    up = 1 if neighbour[1] < point[1] else -1
    axes.annotate(
        f"{point[1]:.4g}",
        point,
        (8 * side, 8 * up),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="bottom" if up > 0 else "top",
        fontsize=10,
    )


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center")
