"""`ranktune plot`."""

from __future__ import annotations

import typer

from ranktune.cli.options import Debug, Finished, Quiet


def plot(
    output: Finished,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
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
