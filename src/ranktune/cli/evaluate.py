"""`ranktune evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranktune.cli.console import standard_output, warn_unless_same_data
from ranktune.cli.options import Debug, Finished, Json, Quiet, SplitName
from ranktune.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console


def evaluate(
    output: Finished,
    split: Annotated[SplitName, typer.Option(help="Which examples to score on.")] = SplitName.evaluation,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Of a nested adapter (dylora): the ranks to score it at, 'all' or such as 1,2,4.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Score this in place of the run's own adapter: the folder of another one (squeezed, exported), or "
            "of a merged model.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Score a finished run again, from its recipe, its adapter and the base model.

    On the same machine and data this gives exactly the score that training
    ended with. Changed data is noticed, and said. With --ranks the scores at
    each rank are also written to rank_curve.csv and rank_curve.png in OUT. What
    squeeze, export or merge made of it is scored with --adapter.

    [bold]Examples[/bold]

        ranktune evaluate runs/first

        ranktune evaluate runs/nested --ranks all

        ranktune evaluate runs/first --adapter runs/first-rank64

        ranktune evaluate runs/first --split train --json
    """
    from ranktune.evaluation import evaluate as evaluate_run
    from ranktune.report.tables import scores_table
    from ranktune.run.display import showing

    console = standard_output()
    if ranks is not None and adapter is not None:
        raise RecipeError("--ranks scores the run's own adapter at its ranks: leave --adapter out.")
    if ranks is not None:
        _score_ranks(console, output, ranks, split, as_json, quiet)
        return
    with showing(console, quiet or as_json) as display:
        result = evaluate_run(output, display, split.value, adapter)
    warn_unless_same_data(result.same_data)
    if as_json:
        shown = {"metric": result.metric, "value": result.value, "scores": result.scores, "recorded": result.recorded}
        if adapter is not None:
            shown["adapter"] = str(adapter)
        typer.echo(json.dumps(shown))
    elif not quiet:
        console.print(scores_table(result))


def _score_ranks(console: Console, output: Path, ranks: str, split: SplitName, as_json: bool, quiet: bool) -> None:
    """Show the scores at each rank, and leave them as CSV and as a picture beside the run."""
    from ranktune.rank_curve import rank_curve, save_curve
    from ranktune.report.rank_curve import rank_curve_figure, rank_curve_table
    from ranktune.report.style import save
    from ranktune.run.directory import RunDirectory
    from ranktune.run.display import showing

    with showing(console, quiet or as_json) as display:
        curve = rank_curve(output, display, ranks, split.value)
    warn_unless_same_data(curve.same_data)
    directory = RunDirectory(output)
    kept = split is SplitName.evaluation
    if kept:
        save_curve(curve, directory.rank_curve)
        save(rank_curve_figure(curve, "Quality at each rank, on the evaluation split"), directory.rank_curve_picture)
    if as_json:
        typer.echo(json.dumps({"metric": curve.metric, "points": [asdict(point) for point in curve.points]}))
    elif not quiet:
        console.print(rank_curve_table(curve))
        if kept:
            typer.echo(f"Written: {directory.rank_curve}, {directory.rank_curve_picture}")
