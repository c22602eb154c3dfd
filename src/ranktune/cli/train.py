"""`ranktune train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranktune.cli.console import standard_output
from ranktune.cli.options import Debug, Quiet
from ranktune.cli.refusals import EXIT_INTERRUPTED
from ranktune.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE.yaml", help="The recipe file; none with --resume.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Recipe keys to set for this run, values as in YAML: train.epochs=1 data.columns.text=body.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the complete recipe and the modules it would adapt; train nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already in the output directory.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Go on with the run in this output directory, under its own recipe.yaml, as if it had never stopped.",
        ),
    ] = None,
    replan: Annotated[
        bool,
        typer.Option(
            "--replan",
            help="With --resume: the run may get another length or other data; its rank schedule begins anew from "
            "the present ranks, over the steps that remain.",
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Train what a recipe describes, and score it before and after.

    The output directory gets the adapter (load it with PEFT), metrics.json,
    ranks.json, log.jsonl, pictures, and the complete recipe. Mistakes in the
    recipe are refused, with exit code 2, before the model's weights are loaded.
    --dry-run shows every key a recipe can have, with its default.

    [bold]Examples[/bold]

        ranktune train examples/quickstart.yaml

        ranktune train my.yaml --dry-run

        ranktune train my.yaml method.name=lora method.r=4 output=runs/lora-4

        ranktune train --resume runs/first
    """
    if resume is not None:
        _resume(resume, recipe, overrides or [], replan=replan, barred=dry_run or overwrite, quiet=quiet)
        return
    if recipe is None:
        raise RecipeError("give a recipe: ranktune train RECIPE.yaml, or --resume OUT to go on with a run.")
    if replan:
        raise RecipeError("--replan belongs to --resume OUT.")
    from ranktune.recipe import load_recipe, recipe_text

    loaded = load_recipe(recipe, overrides or [])
    console = standard_output()
    if dry_run:
        from ranktune.report.tables import plan_table
        from ranktune.training import rehearse

        # First, so that it is seen also where the data cannot be read.
        console.print(recipe_text(loaded), markup=False, highlight=False, soft_wrap=True)
        plan = rehearse(loaded, recipe)
        console.print(plan_table(plan))
        return

    from ranktune.run.display import showing
    from ranktune.training import train as train_recipe

    with _interruption_names_the_way_on(Path(loaded.output)), showing(console, quiet) as display:
        metrics = train_recipe(loaded, recipe, display, overwrite=overwrite)
    if not quiet:
        _summarise(console, metrics, loaded.output)


def _resume(
    output: Path, recipe: Path | None, overrides: list[str], *, replan: bool, barred: bool, quiet: bool
) -> None:
    """`ranktune train --resume OUT [KEY=VALUE...]`: the first argument, a recipe otherwise, is an override."""
    if recipe is not None and "=" not in str(recipe):
        raise RecipeError(f"--resume goes on under {output / 'recipe.yaml'}: leave {recipe} out.")
    if barred:
        raise RecipeError("--resume goes on with a run: it goes neither with --dry-run nor with --overwrite.")
    from ranktune.run.display import showing
    from ranktune.training import resume

    console = standard_output()
    first = [] if recipe is None else [str(recipe)]
    with _interruption_names_the_way_on(output), showing(console, quiet) as display:
        metrics = resume(output, [*first, *overrides], display, replan=replan)
    if not quiet:
        _summarise(console, metrics, str(output))


def _summarise(console: Console, metrics: dict[str, Any], output: str) -> None:
    from ranktune.report.tables import summary_table

    console.print(summary_table(metrics))
    typer.echo(f"Saved in {output}. Score it again: ranktune evaluate {output}")


@contextmanager
def _interruption_names_the_way_on(output: Path) -> Iterator[None]:
    """Tell on Ctrl-C how to go on with the run in `output`."""
    try:
        yield
    except KeyboardInterrupt as error:
        from ranktune.run.checkpoints import find_checkpoint
        from ranktune.run.directory import RunDirectory

        directory = RunDirectory(output)
        way_on = f"ranktune train --resume {output}"
        found = find_checkpoint(directory.checkpoints).newest
        if not directory.recipe.exists() or directory.metrics.exists():
            said = "interrupted before training began"
        elif found is None:
            said = f"interrupted; there is no checkpoint yet (train.save_every), so {way_on} begins at step 0"
        else:
            said = f"interrupted; {found.path.name} is the last checkpoint; resume with: {way_on}"
        typer.echo(said, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error
