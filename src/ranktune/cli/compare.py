"""`ranktune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.console import standard_output
from ranktune.cli.options import Debug, Quiet
from ranktune.cli.refusals import EXIT_INTERRUPTED


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set for all runs.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the comparison.")] = Path("runs/comparison"),
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, by commas; name\\[field=value] sets a field. All by default.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method that are compared.")] = 3,
    search: Annotated[
        bool, typer.Option(help="Search each method's learning rate, on a part of the training data.")
    ] = True,
    search_seeds: Annotated[int, typer.Option(min=1, help="Seeds over which a learning rate is judged.")] = 1,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the training data that the search scores on.")
    ] = 0.1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Train on a Ray cluster instead (pip install ranktune\\[ray]).")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Train runs again that failed.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report the runs that have ended so far; train nothing.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Compare methods on the recipe's data, at equal parameters and each at its best learning rate.

    Every method gets the number of parameters that plain LoRA has at the recipe's
    r. Its learning rate is searched on a part of the training data; then it is
    trained with several seeds and scored on the evaluation data. The folder gets
    one JSON per run, table.csv, report.md, pictures and report.html.

    Started again, the command goes on where it was; started twice with the same
    --out, two processes share the work.

    [bold]Examples[/bold]

        ranktune compare my.yaml --methods lora,dora,dynamic-dora --seeds 3 --out runs/mine

        ranktune compare my.yaml --methods "lora,mor\\[num_experts=4]" --no-search train.epochs=1
    """
    from ranktune.compare.command import compare_recipe
    from ranktune.compare.driver import Options
    from ranktune.compare.methods import default_methods, parse_methods
    from ranktune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    options = Options(
        methods=default_methods() if methods is None else parse_methods(methods),
        seeds=seeds,
        out=out,
        search=search,
        search_seeds=search_seeds,
        validation=validation,
    )
    console = standard_output()
    try:
        summary, written = compare_recipe(
            loaded,
            recipe,
            options,
            None if quiet else console,
            jobs=jobs,
            on_ray=ray,
            retry_failed=retry_failed,
            report_only=report_only,
        )
    except KeyboardInterrupt as error:
        typer.echo(
            f"interrupted; runs that had ended are in {out / 'runs'}. The same command goes on from there, and with "
            "--report-only it reports them.",
            err=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from error
    if not quiet:
        from ranktune.report.comparison.terminal import outcome_lines, outcome_table

        console.print(outcome_table(summary))
        for line in (*outcome_lines(summary), f"Written: {', '.join(str(path) for path in written)}"):
            typer.echo(line)
