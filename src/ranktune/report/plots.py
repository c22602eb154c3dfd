"""The pictures in a run's directory: loss, metric and ranks, redrawn at any time from its log."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ranktune.report.curves import Event, loss_figure, metric_figure
from ranktune.report.rank_history import budget_figure, importance_figure, rank_history, rank_history_figure
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
    drawn: dict[Path, Figure] = dict(
        zip(
            directory.pictures,
            (
                loss_figure(events, f"Loss: {run}"),
                metric_figure(
                    events, metric, f"{metric.replace('_', ' ').capitalize()} on the evaluation split: {run}"
                ),
                rank_map_figure(final, f"Rank of each module: {run}, total {sum(final.values()):,}"),
            ),
            strict=True,
        )
    )
    if ranks["history"]:
        drawn |= zip(directory.movement_pictures, _movement(events, ranks, run), strict=True)
    for path, figure in drawn.items():
        save(figure, path)
    return list(drawn)


def _movement(events: list[Event], ranks: dict, run: str) -> tuple[Figure, Figure, Figure]:
    last_step = max(event.get("step", 0) for event in events)
    history = rank_history(ranks["final"], ranks["history"], last_step)
    return (
        budget_figure(history, events, f"Total rank: {run}"),
        rank_history_figure(history, f"Rank of each module over time: {run}"),
        importance_figure(ranks["importance"], f"Importance: {run}"),
    )
