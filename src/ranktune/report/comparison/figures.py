"""The interactive figures of report.html (plotly), each a function of a summary or of one run's details."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from ranktune.compare.summary import Summary
from ranktune.report.comparison.details import MethodDetails
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
from ranktune.report.rank_history import RankHistory
from ranktune.report.rank_map import rank_grid
from ranktune.report.style import BLUE, GREEN, GREY, ORANGE


def _figure(height: int, x: str, y: str, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 20, "r": 20, "t": 40, "b": 20},
        font={"size": 14, "family": "system-ui, sans-serif"},
        xaxis={"title": {"text": x}, "automargin": True, "showgrid": True, "gridcolor": "#E4E4E4"},
        yaxis={"title": {"text": y}, "automargin": True, "showgrid": True, "gridcolor": "#E4E4E4"},
        hoverlabel={"font": {"size": 14}},
    )
    return figure.update_layout(**layout)


def scores(summary: Summary) -> go.Figure:
    """Mean with its 95 % interval and every seed, a line per method, the first on top; what has no score says why."""
    methods = summary.methods
    figure = _figure(160 + 56 * len(methods), f"{metric_words(summary)} on the evaluation data", "")
    means = [(row, method.label, method.interval) for row, method in enumerate(methods) if method.interval]
    figure.add_scatter(
        x=[interval.mean for *_, interval in means],
        y=[row for row, *_ in means],
        customdata=[label for _, label, _ in means],
        mode="markers",
        name="mean, 95 % t-interval",
        marker={"symbol": "diamond", "size": 13, "color": BLUE},
        error_x={"array": [interval.half_width or 0.0 for *_, interval in means], "color": BLUE, "thickness": 3},
        hovertemplate="%{customdata}: mean %{x:.4f}<extra></extra>",
    )
    # Below the mean and one below the other: equal scores of two seeds are still two marks.
    seeds = [
        (score, row + 0.16 + 0.24 * place / len(method.scores), f"{method.label}, seed {seed}")
        for row, method in enumerate(methods)
        for place, (seed, score) in enumerate(method.scores.items())
    ]
    figure.add_scatter(
        x=[score for score, *_ in seeds],
        y=[place for _, place, _ in seeds],
        customdata=[name for *_, name in seeds],
        mode="markers",
        name="one seed",
        marker={"size": 8, "color": "rgba(0,0,0,0)", "line": {"color": "#444444", "width": 1.5}},
        hovertemplate="%{customdata}: %{x:.4f}<extra></extra>",
    )
    labels = [
        f"{method.label}<br>({words})" if (words := trouble_words(method)) else method.label for method in methods
    ]
    rows = {"tickvals": list(range(len(methods))), "ticktext": labels, "range": [len(methods) - 0.4, -0.6]}
    if scores_astray(summary):
        bounds = np.log10([min(score for score, *_ in seeds), max(score for score, *_ in seeds)])
        figure.update_layout(xaxis={"type": "log", "range": [bounds[0] - 0.2, bounds[1] + 0.2]})
    return figure.update_layout(
        yaxis={**rows, "ticksuffix": "  "}, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )


_PARAMETERS = "trained parameters at the end, head included"


def pareto(summary: Summary) -> go.Figure:
    """Score against trained parameters at the end; the front is marked, and joined by a line."""
    panels = parameter_panels(scored(summary))
    figure = _figure(520, "", metric_words(summary))
    figure.set_subplots(
        1,
        len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.09,
        column_widths=[0.75, 0.25][: len(panels)] if len(panels[0]) >= len(panels[-1]) else [0.25, 0.75],
    )
    front: list[tuple[float, float]] = []
    for column, panel in enumerate(panels, start=1):
        front = front_steps(panel, front[-1][1] if front else None)
        figure.add_scatter(
            x=[count for count, _ in front],
            y=[score for _, score in front],
            mode="lines",
            line={"shape": "hv", "dash": "dash", "color": GREEN},
            name="Pareto front",
            showlegend=column == 1,
            hoverinfo="skip",
            row=1,
            col=column,
        )
        log, bounds = spread_out(panel), panel_range(panel)
        figure.update_xaxes(
            type="log" if log else "linear",
            range=np.log10(bounds) if log else bounds,
            dtick="D2" if log else None,
            # Of a method by itself the number is the tick.
            tickvals=[panel[0].trainable] if len(panel) == 1 else None,
            nticks=5,
            tickformat=",.4~r" if log else ",d",
            title=_PARAMETERS if len(panel) == max(map(len, panels)) else None,
            automargin=True,
            showgrid=True,
            gridcolor="#E4E4E4",
            col=column,
        )
    places = {method.label: column for column, panel in enumerate(panels, start=1) for method in panel}
    for label, mark in marks(summary).items():
        method = next(method for method in summary.methods if method.label == label)
        if method.interval is None:
            continue
        figure.add_scatter(
            x=[method.trainable],
            y=[method.interval.mean],
            mode="markers",
            name=method.label + (" (front)" if method.on_front else ""),
            marker={
                "size": 14,
                "symbol": mark.symbol,
                "color": mark.colour,
                "line": {"width": 2 if method.on_front else 0, "color": "#000000"},
            },
            hovertemplate=f"{method.label}: %{{x:,.0f}} parameters, %{{y:.4f}}<extra></extra>",
            row=1,
            col=places[label],
        )
    if scores_astray(summary):
        figure.update_yaxes(type="log")
    figure.update_yaxes(showgrid=True, gridcolor="#E4E4E4")
    return figure.update_layout(legend={"x": 1.02, "y": 1.0})


def cost(summary: Summary, field: str, scale: float, name: str) -> go.Figure:
    """One bar per method."""
    methods = [method for method in scored(summary) if field in method.costs]
    figure = _figure(120 + 40 * len(methods), name, "")
    figure.add_bar(
        x=[method.costs[field] / scale for method in methods],
        y=[method.label for method in methods],
        orientation="h",
        marker={"color": BLUE},
        texttemplate="%{x:,.4~r}",
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:,.1f}<extra></extra>",
    )
    return figure.update_layout(yaxis={"autorange": "reversed", "ticksuffix": "  "}, margin={"r": 70})


def rates(summary: Summary) -> go.Figure:
    """Score on the validation part at every learning rate that was tried; the chosen one is large."""
    figure = _figure(520, "learning rate", f"{metric_words(summary)} on the validation part")
    sign = 1.0 if summary.greater_is_better else -1.0
    tried = sorted({rate for method in summary.methods for rate in method.trials})
    drawn = marks(summary)
    for method in summary.methods:
        points = [(rate, sign * (trial.score or 0.0)) for rate, trial in method.trials.items() if trial.usable]
        mark = drawn[method.label]
        figure.add_scatter(
            x=[rate for rate, _ in points],
            y=[score for _, score in points],
            mode="lines+markers",
            name=method.label if points else f"{method.label} (none usable)",
            showlegend=True,
            line={"color": mark.colour, "dash": mark.dash},
            marker={"symbol": mark.symbol, "size": [16 if rate == method.rate else 9 for rate, _ in points]},
            hovertemplate=f"{method.label}: %{{x:g}}, %{{y:.4f}}<extra></extra>",
        )
    ticks = {"tickvals": tried, "ticktext": [f"{rate:g}" for rate in tried]}
    if scores_astray(summary):
        figure.update_yaxes(type="log")
    return figure.update_layout(xaxis={"type": "log", **ticks}, legend={"x": 1.02, "y": 1.0})


def rank_map(history: RankHistory) -> go.Figure:
    """Rank of every module, layers to the right; a slider goes through the moments at which ranks changed."""
    grids = [
        rank_grid({module: int(rank) for module, rank in zip(history.modules, history.ranks[:, moment], strict=True)})
        for moment in range(len(history.steps))
    ]
    last = grids[-1]
    cells = [[[None if np.isnan(rank) else int(rank) for rank in row] for row in grid.ranks] for grid in grids]
    figure = _figure(220 + 26 * len(last.rows), "layer", "")
    figure.add_heatmap(
        z=cells[-1],
        x=last.columns,
        y=last.rows,
        colorscale="Blues",
        zmin=0,
        zmax=max(1.0, float(np.nanmax(history.ranks))),
        xgap=2,
        ygap=2,
        texttemplate="%{z}" if last.ranks.size <= 600 else None,
        colorbar={"title": {"text": "rank"}, "dtick": max(1, int(np.nanmax(history.ranks)) // 5)},
        hovertemplate="%{y}, layer %{x}: rank %{z}<extra></extra>",
    )
    stops = [
        {"method": "restyle", "label": str(step), "args": [{"z": [moment]}]}
        for step, moment in zip(history.steps, cells, strict=True)
    ]
    slider = {"active": len(stops) - 1, "steps": stops, "currentvalue": {"prefix": "optimizer step "}, "pad": {"t": 60}}
    return figure.update_layout(
        sliders=[slider] if len(stops) > 2 else [],
        xaxis={"type": "category", "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False, "ticksuffix": "  "},
    )


def budget(details: MethodDetails) -> go.Figure:
    """Total rank and the budget over time; a budget in parameters has an axis of its own at the right."""
    figure = _figure(360, "optimizer step", "rank-1 components in use")
    steps = [] if details.history is None else details.history.steps
    total = [] if details.history is None else details.history.ranks.sum(0).tolist()
    figure.add_scatter(x=steps, y=total, mode="lines", line={"shape": "hv", "color": BLUE}, name="total rank")
    if details.budget:
        when, values = (list(column) for column in zip(*details.budget, strict=True))
        end = max([*when, *steps])
        in_components = max(values) <= 2 * max(total, default=0)
        figure.add_scatter(
            x=[*when, end],
            y=[*values, values[-1]],
            mode="lines",
            line={"shape": "hv", "dash": "dash", "color": ORANGE},
            name="budget" if in_components else "budget (at the right)",
            yaxis="y" if in_components else "y2",
        )
        if not in_components:
            other = {"title": {"text": "parameters allowed"}, "overlaying": "y", "side": "right", "rangemode": "tozero"}
            figure.update_layout(yaxis2={**other, "showgrid": False, "automargin": True, "tickformat": ",d"})
    return figure.update_layout(
        yaxis={"rangemode": "tozero"}, showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )


def importance(details: MethodDetails) -> go.Figure:
    """Everything that was scored, by falling importance; kept and dropped ones told apart."""
    figure = _figure(360, "place by falling importance", "importance (running average)")
    scored = [(score, True) for score in details.kept] + [(score, False) for score in details.dropped]
    placed = [(place, *item) for place, item in enumerate(sorted(scored, key=lambda item: -item[0]), start=1)]
    for kept, name, color, symbol in ((True, "kept", BLUE, "circle"), (False, "dropped", GREY, "x")):
        points = [(place, score) for place, score, was_kept in placed if was_kept is kept]
        if points:
            figure.add_scatter(
                x=[place for place, _ in points],
                y=[score for _, score in points],
                mode="markers",
                name=f"{name} ({len(points)})",
                marker={"color": color, "symbol": symbol, "size": 6},
            )
    positive = [score for score, _ in scored if score > 0]
    wide = bool(positive) and max(positive) > 20 * min(positive)
    decades = np.log10(max(positive) / min(positive)) if wide else 0.0
    axis = {"type": "log", "dtick": 1 if decades > 4 else "D2"} if wide else {"type": "linear"}
    return figure.update_layout(yaxis={**axis, "exponentformat": "e"}, showlegend=True)


def rank_curve(details: MethodDetails, metric: str) -> go.Figure:
    """DyLoRA's score at every rank, from one checkpoint."""
    figure = _figure(360, "rank the adapter is cut at", metric.replace("_", " "))
    return figure.add_scatter(
        x=[row["rank"] for row in details.curve],
        y=[row[metric] for row in details.curve],
        customdata=[row["parameters"] for row in details.curve],
        mode="lines+markers",
        marker={"color": BLUE, "size": 9},
        hovertemplate="rank %{x}: %{y:.4f}, %{customdata:,.0f} parameters<extra></extra>",
    )


def experts(details: MethodDetails) -> go.Figure:
    """Mean gate of each of MoR's experts in every module."""
    modules = list(details.experts)
    figure = _figure(200 + 22 * len(modules), "expert", "")
    figure.add_heatmap(
        z=list(details.experts.values()),
        x=[str(number) for number in range(1, 1 + max(map(len, details.experts.values())))],
        y=modules,
        colorscale="Blues",
        zmin=0,
        colorbar={"title": {"text": "mean gate"}},
        hovertemplate="%{y}, expert %{x}: %{z:.3f}<extra></extra>",
    )
    return figure.update_layout(yaxis={"autorange": "reversed", "ticksuffix": "  "}, xaxis={"type": "category"})
