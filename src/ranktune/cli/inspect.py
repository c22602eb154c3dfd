"""`ranktune inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.console import standard_output
from ranktune.cli.options import Debug, Json
from ranktune.errors import RecipeError


def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="The folder of an adapter, or a run's output directory.", show_default=False
        ),
    ],
    as_json: Json = False,
    png: Annotated[Path | None, typer.Option(help="Draw the ranks into this file as well.", show_default=False)] = None,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Show what is inside a saved adapter, ours or stock PEFT's LoRA, DoRA or AdaLoRA.

    The base model is not needed and nothing from the folder is run: ranks as
    a grid of layers and modules, the norm and energy of each module's update,
    sizes, and how the ranks moved where the run's ranks.json lies beside it.

    [bold]Examples[/bold]

        ranktune inspect runs/first

        ranktune inspect adapters/someone-elses --png ranks.png --json
    """
    from ranktune.inspection import inspect as inspect_folder
    from ranktune.report.inspection import inspection_lines, module_table, rank_table

    if png is not None and not png.absolute().parent.is_dir():
        raise RecipeError(f"--png {png}: there is no directory {png.parent}.")
    found = inspect_folder(adapter)
    if png is not None:
        from ranktune.report.rank_map import rank_map_figure
        from ranktune.report.style import save

        save(rank_map_figure(found.ranks, f"Rank of each module: {adapter}, total {sum(found.ranks.values()):,}"), png)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    console = standard_output()
    for line in inspection_lines(found):
        typer.echo(line)
    if (grid := rank_table(found)) is not None:
        console.print(grid)
    console.print(module_table(found))
