"""PNGs of a comparison for places where HTML does not go: scores, Pareto front, cost, learning rates."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ranktune.compare.summary import MethodSummary, Summary
from ranktune.report.style import BLUE, GREEN, GREY, ORANGE, dress, new_figure, save

# Told apart by colour, in Okabe and Ito's palette, and by shape.
_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000", GREY)
_MARKERS = "osD^v<>P*X"


def draw(out: Path, summary: Summary) -> list[Path]:
    """Draw what there is to draw into the folder, and return the paths."""
    scored = [method for method in summary.methods if method.interval is not None]
    drawn: dict[str, Figure] = {}
    if scored:
        drawn |= {"score": _scores(scored, summary), "pareto": _pareto(scored, summary), "cost": _cost(scored)}
    tried = [method for method in summary.methods if any(trial.usable for trial in method.trials.values())]
    if tried:
        drawn["learning_rates"] = _rates(tried, summary)
    paths = []
    for name, figure in drawn.items():
        paths.append(out / f"{name}.png")
        save(figure, paths[-1])
    return paths


def _metric(summary: Summary) -> str:
    return summary.metric.replace("_", " ")


def _scores(methods: list[MethodSummary], summary: Summary) -> Figure:
    figure, axes = new_figure(8.0, 1.6 + 0.45 * len(methods))
    for row, method in enumerate(methods):
        interval = method.interval
        if interval is None:
            continue
        if interval.low is not None and interval.high is not None:
            axes.plot([interval.low, interval.high], [row, row], color=BLUE, linewidth=3, alpha=0.35, zorder=2)
        beside = [row + 0.14 + 0.22 * place / len(method.scores) for place in range(len(method.scores))]
        axes.plot(list(method.scores.values()), beside, "o", color="none", markeredgecolor="#444444", markersize=5)
        axes.plot(interval.mean, row, "D", color=BLUE, markersize=7, zorder=4)
    axes.set_yticks(range(len(methods)), [method.label for method in methods])
    axes.invert_yaxis()
    title = f"{_metric(summary)}: mean (diamond), 95 % t-interval (bar) and every seed (dots)"
    dress(axes, title, f"{_metric(summary)} on the evaluation data", "")
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    return figure


def _pareto(methods: list[MethodSummary], summary: Summary) -> Figure:
    figure, axes = new_figure(9.0, 4.8)
    front = sorted((m.trainable or 0.0, m.interval.mean) for m in methods if m.on_front and m.interval)
    axes.step(*zip(*front, strict=True), where="post", color=GREEN, linestyle="--", label="Pareto front", zorder=2)
    for number, method in enumerate(methods):
        if method.interval is not None:
            axes.errorbar(
                method.trainable or 0.0,
                method.interval.mean,
                yerr=method.interval.half_width,
                fmt=_MARKERS[number % len(_MARKERS)],
                color=_COLOURS[number % len(_COLOURS)],
                ecolor="#C8C8C8",
                markersize=8,
                label=method.label + (" (front)" if method.on_front else ""),
                zorder=3,
            )
    axes.set_xscale("log")
    dress(axes, "Score against trained parameters", "trained parameters at the end, head included", _metric(summary))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def _cost(methods: list[MethodSummary]) -> Figure:
    figure, axes = new_figure(9.0, 1.8 + 0.42 * len(methods))
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
    panels[0].set_yticks(range(len(methods)), [method.label for method in methods])
    panels[0].invert_yaxis()
    return figure


def _rates(methods: list[MethodSummary], summary: Summary) -> Figure:
    figure, axes = new_figure(9.0, 4.8)
    for number, method in enumerate(methods):
        sign = 1.0 if summary.greater_is_better else -1.0
        points = [(rate, sign * (trial.score or 0.0)) for rate, trial in method.trials.items() if trial.usable]
        rates, scores = zip(*points, strict=True)
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        axes.plot(rates, scores, color=colour, marker=marker, label=method.label)
    axes.set_xscale("log")
    dress(axes, "Learning rates, on the validation part of the training data", "learning rate", _metric(summary))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure
