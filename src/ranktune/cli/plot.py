"""`ranktune plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.options import Debug, Quiet
from ranktune.cli.refusals import refusals_are_messages


@refusals_are_messages
def plot(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A run's output directory.", show_default=False)],
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Draw a run's pictures again from its log: loss, metric, and the rank of every module.

    [bold]Example[/bold]

        ranktune plot runs/first
    """
    from ranktune.report.plots import draw_run
    from ranktune.run.directory import RunDirectory

    for path in draw_run(RunDirectory(output)):
        if not quiet:
            typer.echo(str(path))
