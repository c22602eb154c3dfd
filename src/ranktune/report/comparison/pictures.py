"""PNGs of a comparison for places where HTML does not go: scores, Pareto front, cost, learning rates."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ranktune.compare.summary import MethodSummary, Summary
from ranktune.report.comparison.marks import (
    front_steps,
    marks,
    metric_words,
    panel_range,
    parameter_panels,
    scored,
    scores_astray,
    spread_out,
    trouble_words,
)
from ranktune.report.style import BLUE, GREEN, ORANGE, dress, new_figure, save


def draw(out: Path, summary: Summary) -> list[Path]:
    """Draw what there is to draw into the folder, and return the paths."""
    drawn: dict[str, Figure] = {}
    if methods := scored(summary):
        drawn |= {"score": _scores(summary), "pareto": _pareto(methods, summary), "cost": _cost(methods)}
    tried = [method for method in summary.methods if any(trial.usable for trial in method.trials.values())]
    if tried:
        drawn["learning_rates"] = _rates(tried, summary)
    paths = []
    for name, figure in drawn.items():
        paths.append(out / f"{name}.png")
        save(figure, paths[-1])
    return paths


def _room_for(labels: list[str]) -> float:
    """Inches that the longest label at the left takes beyond what a figure has for it."""
    return max(0.0, 0.085 * (max(map(len, labels)) - 16))


def _scores(summary: Summary) -> Figure:
    methods = summary.methods
    labels = [f"{method.label}\n({words})" if (words := trouble_words(method)) else method.label for method in methods]
    figure, axes = new_figure(8.0 + _room_for(labels), 1.6 + 0.45 * len(methods))
    for row, method in enumerate(methods):
        interval = method.interval
        if interval is None:
            continue
        if interval.low is not None and interval.high is not None:
            axes.plot([interval.low, interval.high], [row, row], color=BLUE, linewidth=3, alpha=0.35, zorder=2)
        beside = [row + 0.14 + 0.22 * place / len(method.scores) for place in range(len(method.scores))]
        axes.plot(list(method.scores.values()), beside, "o", color="none", markeredgecolor="#444444", markersize=5)
        axes.plot(interval.mean, row, "D", color=BLUE, markersize=7, zorder=4)
    title = f"{metric_words(summary)}: mean (diamond), 95 % t-interval (bar) and every seed (dots)"
    dress(axes, title, f"{metric_words(summary)} on the evaluation data", "")
    axes.set_yticks(range(len(methods)), labels)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    if scores_astray(summary):
        scores = [score for method in methods for score in method.scores.values()]
        axes.set_xscale("log")
        axes.set_xlim(min(scores) / 1.6, max(scores) * 1.6)
    else:
        _plain_numbers(axes.xaxis)
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    return figure


def _plain_numbers(axis: Axis) -> None:
    """Every tick as a number that means what it says, and as many as there is room for."""
    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def _pareto(methods: list[MethodSummary], summary: Summary) -> Figure:
    panels = parameter_panels(methods)
    figure, axes = new_figure(9.0 + _room_for([method.label for method in methods]), 4.8)
    axes.remove()
    widths = [1.0] if len(panels) == 1 else [3.0, 1.0] if len(panels[0]) >= len(panels[1]) else [1.0, 3.0]
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    front: list[tuple[float, float]] = []
    for place, (axes, panel) in enumerate(zip(row, panels, strict=True)):
        if front := front_steps(panel, front[-1][1] if front else None):
            axes.step(*zip(*front, strict=True), where="post", color=GREEN, linestyle="--", zorder=2)
        dress(axes, "" if place else "Score against trained parameters", "", "" if place else metric_words(summary))
        if spread_out(panel):
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            # Of a method by itself the number is the tick.
            alone = [panel[0].trainable or 0.0] if len(panel) == 1 else None
            axes.xaxis.set_major_locator(MaxNLocator(5) if alone is None else FixedLocator(alone))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axes.set_xlim(panel_range(panel))
    places = {method.label: axes for axes, panel in zip(row, panels, strict=True) for method in panel}
    keys = [row[0].plot([], [], color=GREEN, linestyle="--", label="Pareto front")[0]]
    for label, mark in marks(summary).items():
        method = next((method for method in methods if method.label == label), None)
        if method is None or method.interval is None:
            continue
        keys += places[label].plot(
            method.trainable or 0.0,
            method.interval.mean,
            mark.marker,
            color=mark.colour,
            markersize=9,
            markeredgecolor="#000000" if method.on_front else mark.colour,
            markeredgewidth=1.5,
            label=label + (" (front)" if method.on_front else ""),
            zorder=3,
        )
    if scores_astray(summary):
        row[0].set_yscale("log")
    else:
        _plain_numbers(row[0].yaxis)
    figure.supxlabel("trained parameters at the end, head included", fontsize=10)
    row[-1].legend(handles=keys, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def _cost(methods: list[MethodSummary]) -> Figure:
    labels = [method.label for method in methods]
    figure, axes = new_figure(9.0 + _room_for(labels), 1.8 + 0.42 * len(methods))
    axes.remove()
    panels = figure.subplots(1, 2, sharey=True)
    for panel, field, scale, name in (
        (panels[0], "train_time", 1.0, "training, seconds"),
        (panels[1], "accelerator_memory_max", 2**20, "peak memory, MiB"),
    ):
        values = [method.costs.get(field, 0.0) / scale for method in methods]
        panel.barh(range(len(methods)), values, color=BLUE if field == "train_time" else ORANGE, height=0.6)
        for row, value in enumerate(values):
            panel.annotate(f"{value:,.4g}", (value, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
        panel.margins(x=0.18)
        dress(panel, "", name, "")
        panel.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_yticks(range(len(methods)), labels)
    panels[0].invert_yaxis()
    return figure


def _rates(methods: list[MethodSummary], summary: Summary) -> Figure:
    figure, axes = new_figure(9.0 + _room_for([method.label for method in methods]), 4.8)
    sign = 1.0 if summary.greater_is_better else -1.0
    drawn = marks(summary)
    for method in methods:
        points = {rate: sign * (trial.score or 0.0) for rate, trial in method.trials.items() if trial.usable}
        mark = drawn[method.label]
        axes.plot(
            *zip(*points.items(), strict=True), mark.line, color=mark.colour, marker=mark.marker, label=method.label
        )
        if method.rate in points:
            axes.plot(method.rate, points[method.rate], mark.marker, color=mark.colour, markersize=11)
    title = "Learning rates, on the validation part of the training data; the chosen one is large"
    dress(axes, title, "learning rate", metric_words(summary))
    axes.set_xscale("log")
    tried = sorted({rate for method in methods for rate in method.trials})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.xaxis.set_minor_locator(NullLocator())
    if scores_astray(summary):
        axes.set_yscale("log")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure
