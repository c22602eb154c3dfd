"""The command line. A command stands in the file of its own name: `ranktune train` in cli/train.py.

Typer is the only heavy import until a command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ranktune.cli import compare, evaluate, export, inspect, merge, plot, squeeze, train, truncate
from ranktune.cli.startup import silence_chatty_libraries

app = typer.Typer(
    name="ranktune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import ranktune

        typer.echo(f"ranktune {ranktune.__version__}")
        raise typer.Exit


@app.callback()
def ranktune_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune a model with low-rank adapters whose rank is chosen for you.

    A run is described by one YAML file, the recipe:

        model: all-minilm
        method: {name: dora, r: 8}
        train: {epochs: 3, learning_rate: 1e-3}
        output: runs/first

    and started with [bold]ranktune train recipe.yaml[/bold].
    """


# In the order of the help.
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(plot.plot)
app.command()(truncate.truncate)
app.command()(export.export)
app.command()(merge.merge)
app.command()(squeeze.squeeze)
app.command()(inspect.inspect)


def main() -> None:
    """The `ranktune` command."""
    silence_chatty_libraries()
    app()
