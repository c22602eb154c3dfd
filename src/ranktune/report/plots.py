"""The pictures in a run's directory: loss, metric and ranks, redrawn at any time from its log."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ranktune.report.curves import Event, loss_figure, metric_figure
from ranktune.report.expert_use import expert_use_figure, router_entropy_figure
from ranktune.report.rank_curve import drawn_figure
from ranktune.report.rank_history import (
    budget_figure,
    budget_steps,
    importance_figure,
    rank_history,
    rank_history_figure,
)
from ranktune.report.rank_map import rank_map_figure
from ranktune.report.style import save
from ranktune.run.directory import RunDirectory


def draw_run(directory: RunDirectory) -> list[Path]:
    """Draw the run's pictures from `log.jsonl` and `ranks.json`, and return their paths.

    Raises:
        RecipeError: there is no run in the directory, or its log was damaged.
    """
    events, ranks = directory.read_events(), directory.read_ranks()
    start = next((event for event in events if event["event"] == "start"), {})
    run = f"{start.get('method', 'run')} on {Path(start.get('model', 'model')).name}"
    metric, final = start.get("metric", "loss"), ranks["final"]
    loss, score, rank_map = directory.pictures
    drawn: dict[Path, Figure] = {
        loss: loss_figure(events, f"Loss: {run}"),
        score: metric_figure(events, metric, f"{metric.replace('_', ' ').capitalize()} on the evaluation split: {run}"),
    }
    if final:  # a model trained in full has no ranks
        drawn[rank_map] = rank_map_figure(final, f"Rank of each module: {run}, total {sum(final.values()):,}")
    if ranks["history"]:
        drawn |= _movement(directory, events, ranks, run)
    if ranks.get("drawn"):
        counts = {int(rank): steps for rank, steps in ranks["drawn"].items()}
        drawn[directory.drawn_picture] = drawn_figure(counts, f"Steps that trained each rank: {run}")
    if routers := [event for event in events if event["event"] == "routers"]:
        experts, entropy = directory.router_pictures
        drawn[experts] = expert_use_figure(routers[-1], f"Use of experts at step {routers[-1]['step']}: {run}")
        drawn[entropy] = router_entropy_figure(routers, f"Entropy of the routers: {run}")
    for path, figure in drawn.items():
        save(figure, path)
    return list(drawn)


def _movement(directory: RunDirectory, events: list[Event], ranks: dict, run: str) -> dict[Path, Figure]:
    last_step = max(event.get("step", 0) for event in events)
    history = rank_history(ranks["final"], ranks["history"], last_step)
    budget, over_time, importance = directory.movement_pictures
    drawn = {
        budget: budget_figure(history, budget_steps(ranks, events), f"Total rank: {run}"),
        over_time: rank_history_figure(history, f"Rank of each module over time: {run}"),
    }
    if "importance" in ranks:
        drawn[importance] = importance_figure(ranks["importance"], f"Importance: {run}")
    return drawn
