"""The command line. A command stands in the file of its own name: `ranktune train` in cli/train.py.

Typer is the only heavy import until a command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ranktune.cli import compare, evaluate, export, inspect, merge, plot, squeeze, train, truncate
from ranktune.cli.refusals import refusals_are_messages
from ranktune.run.startup import share_the_cores, silence_chatty_libraries

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
    version: Annotated[  # noqa: ARG001  (its callback acts)
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
    share_the_cores()


# In the order of the help.
for command in (
    train.train,
    evaluate.evaluate,
    compare.compare,
    plot.plot,
    truncate.truncate,
    export.export,
    merge.merge,
    squeeze.squeeze,
    inspect.inspect,
):
    app.command()(refusals_are_messages(command))


def main() -> None:
    """The `ranktune` command."""
    silence_chatty_libraries()
    app()
