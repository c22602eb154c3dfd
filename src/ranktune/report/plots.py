"""The pictures in a run's directory: loss, metric and ranks, redrawn at any time from its log."""

from __future__ import annotations

from pathlib import Path

from ranktune.report.curves import loss_figure, metric_figure
from ranktune.report.rank_map import rank_map_figure
from ranktune.report.style import save
from ranktune.run.directory import RunDirectory


def draw_run(directory: RunDirectory) -> list[Path]:
    """Draw the run's pictures from `log.jsonl` and `ranks.json`, and return their paths.

    Raises:
        RecipeError: there is no run in the directory, or its log was damaged.
    """
    events, ranks = directory.read_events(), directory.read_ranks()["final"]
    start = next((event for event in events if event["event"] == "start"), {})
    run = f"{start.get('method', 'run')} on {Path(start.get('model', 'model')).name}"
    metric = start.get("metric", "loss")
    figures = (
        loss_figure(events, f"Loss: {run}"),
        metric_figure(events, metric, f"{metric.replace('_', ' ').capitalize()} on the evaluation split: {run}"),
        rank_map_figure(ranks, f"Rank of each module: {run}, total {sum(ranks.values()):,}"),
    )
    for path, figure in zip(directory.pictures, figures, strict=True):
        save(figure, path)
    return list(directory.pictures)
