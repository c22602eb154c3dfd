"""How ranks moved: the budget curve, the rank of every module over time, and which components were kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ranktune.report.style import BLUE, GREY, ORANGE, SEQUENTIAL, dress, new_figure, put_title

_LABELLED_ROWS = 80
_NAMED_MODULES = 3


@dataclass(frozen=True)
class RankHistory:
    """The rank of every module [modules, moments] between the changes at `steps`, from step 0 to the end of the run."""

    modules: list[str]
    steps: list[int]
    ranks: np.ndarray


def rank_history(final: Mapping[str, int], changes: Sequence[Mapping[str, Any]], last_step: int) -> RankHistory:
    """Replay the changes (`step`, `module`, `old`, `new`) backwards from the final ranks."""
    steps = sorted({0, last_step, *(change["step"] for change in changes)})
    rows = {module: row for row, module in enumerate(final)}
    ranks = np.tile(np.array(list(final.values()), dtype=float)[:, None], (1, len(steps)))
    for change in reversed(changes):
        ranks[rows[change["module"]], : steps.index(change["step"])] = change["old"]
    return RankHistory(list(final), steps, ranks)


def budget_steps(ranks: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Step and value where a run's budget changed, from `ranks.json`; of another's schedule, where it was logged."""
    return ranks.get("budget") or [
        (event["step"], event["rank_budget"]) for event in events if event.get("rank_budget") is not None
    ]


def budget_figure(history: RankHistory, budget: Sequence[tuple[int, int]], title: str) -> Figure:
    """The total rank after every change, and the budget it had to meet: step and value where that changed."""
    figure, axes = new_figure(7.2, 4.2)
    axes.step(history.steps, history.ranks.sum(0), where="post", color=BLUE, label="total rank", zorder=3)
    if budget and max(value for _, value in budget) <= 2 * history.ranks.sum(0).max():
        # A budget in parameters has another unit and is left to the data.
        steps, values = zip(*budget, strict=True)
        end = max(history.steps[-1], steps[-1])
        axes.step([*steps, end], [*values, values[-1]], where="post", color=ORANGE, linestyle="--", label="budget")
    dress(axes, title, "optimizer step", "rank-1 components in use")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def rank_history_figure(history: RankHistory, title: str) -> Figure:
    """One row per module, time to the right, darker is a higher rank."""
    count = len(history.modules)
    figure, axes = new_figure(9.0, min(1.8 + 0.16 * count, 24))
    edges = np.array([*history.steps[:-1], max(history.steps[-1], history.steps[-2] + 1)], dtype=float)
    image = axes.pcolormesh(edges, np.arange(count + 1), history.ranks[:, :-1], cmap=SEQUENTIAL, vmin=0)
    axes.invert_yaxis()
    every = -(-count // _LABELLED_ROWS) or 1
    axes.set_yticks(np.arange(0, count, every) + 0.5, history.modules[::every], fontsize=7)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    axes.set_xlabel("optimizer step")
    put_title(axes, title)
    bar = figure.colorbar(image, ax=axes, label="rank", pad=0.02)
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.update_ticks()
    return figure


def importance_figure(importance: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> Figure:
    """Everything that was scored by falling importance: components, kept and dropped ones told apart, or modules."""
    kept = [score for module in importance.values() for score in module["kept"]]
    dropped = [score for module in importance.values() for score in module["dropped"]]
    order = np.argsort([-score for score in [*kept, *dropped]], kind="stable")
    places = np.empty(len(order))
    places[order] = np.arange(1, len(order) + 1)
    figure, axes = new_figure(7.2, 4.2)
    axes.plot(places[: len(kept)], kept, ".", color=BLUE, markersize=5, label=f"kept ({len(kept)})")
    if dropped:
        axes.plot(places[len(kept) :], dropped, ".", color=GREY, markersize=5, label=f"dropped ({len(dropped)})")
        axes.legend(frameon=False)
    scored = "module" if not dropped and len(kept) == len(importance) else "component"
    positive = [score for score in [*kept, *dropped] if score > 0]
    if scored == "module":
        _name_the_highest(axes, importance, dict(zip(importance, places[: len(kept)], strict=True)))
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    dress(axes, title, f"{scored}, by importance", "importance (running average)")
    return figure


def _name_the_highest(
    axes: Axes, importance: Mapping[str, Mapping[str, Sequence[float]]], places: Mapping[str, float]
) -> None:
    for module in sorted(places, key=lambda name: places[name])[:_NAMED_MODULES]:
        at = places[module], importance[module]["kept"][0]
        axes.annotate(module, at, (6, 0), textcoords="offset points", va="center", fontsize=7)
