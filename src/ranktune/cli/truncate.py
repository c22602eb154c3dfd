"""`ranktune truncate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.console import standard_output, warn_unless_same_data
from ranktune.cli.options import Debug, Finished, ProfileName, Quiet, SplitName


class BudgetBy(str, Enum):
    """By what a budget is spread over modules."""

    energy = "energy"
    loss = "loss"


def truncate(
    output: Finished,
    rank: Annotated[int | None, typer.Option(help="The rank to cut at.", show_default=False)] = None,
    within: Annotated[
        str | None,
        typer.Option(
            help="Cut at the smallest rank within so much of the best score on the split, such as 1%.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Cut to so many parameters, with a rank for each module.", show_default=False),
    ] = None,
    by: Annotated[
        BudgetBy,
        typer.Option(
            help="With --budget: loss, by exchanges between modules that lower the loss on the split; energy, by what "
            "is cut off, quick and without data.",
        ),
    ] = BudgetBy.loss,
    evaluations: Annotated[int, typer.Option(help="With --by loss: how often it is measured, at most.")] = 500,
    examples: Annotated[int, typer.Option(min=1, help="With --by loss: on so many examples.")] = 256,
    split: Annotated[SplitName, typer.Option(help="Which examples to choose and to score on.")] = SplitName.evaluation,
    profile: Annotated[
        ProfileName | None,
        typer.Option(
            help="uniform: one rank in the file; compact: each module's own. Default: compact with --budget.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to make. Default: OUT-rankB or OUT-budgetN.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Cut a nested adapter (dylora) at a rank, and write it as a plain LoRA that needs no ranktune.

    With --budget each module gets a rank of its own, and the score is shown
    beside that of one rank for all within the same budget. The result is
    loaded in a fresh process by stock PEFT, and its outputs on real inputs are
    compared before it is kept.

    [bold]Examples[/bold]

        ranktune truncate runs/nested --rank 4

        ranktune truncate runs/nested --within 1% --out adapters/small

        ranktune truncate runs/nested --budget 50000 --evaluations 150
    """
    from ranktune.report.rank_curve import rank_curve_table, spending_table, truncated_lines
    from ranktune.run.display import showing
    from ranktune.truncation import truncate as truncate_run

    console = standard_output()
    with showing(console, quiet) as display:
        result = truncate_run(
            output,
            display,
            rank=rank,
            within=within,
            budget=budget,
            by=by.value,
            evaluations=evaluations,
            examples=examples,
            split=split.value,
            out=out,
            profile=None if profile is None else profile.value,
        )
    if quiet:
        return
    if result.curve is not None or result.spending is not None:
        warn_unless_same_data(result.same_data)
    if result.curve is not None:
        console.print(rank_curve_table(result.curve))
    if result.spending is not None:
        console.print(spending_table(result.spending, result.parameters))
    for line in truncated_lines(result):
        typer.echo(line)
