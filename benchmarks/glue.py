"""Methods on GLUE, in pieces: which is better, at what rank, with how much data, and what each of its parts is for.

    python benchmarks/glue.py                                        # the pieces, and which have results
    RANKTUNE_DATA=path/to/data python benchmarks/glue.py stsb-r8     # run one; the same command goes on after a stop
    RANKTUNE_DATA=path/to/data python benchmarks/glue.py rte-r8-500 --methods lora,increlora --jobs 2
    RANKTUNE_DATA=path/to/data python benchmarks/glue.py sst2-r8 --precision fp16     # on a GPU

A piece is one `ranktune compare` of a pretrained encoder (all-MiniLM-L6-v2) on the official training data, scored on
the official dev set: equal final parameters, a learning-rate grid for each method on a tenth of the training data, then
several seeds. Its report is in `--out`; its figures go to `benchmarks/results/`, and from there to `docs/results.md`
(`python benchmarks/results_page.py`). A piece may be run with fewer methods or seeds than it has, and `--report-only`
keeps what there is of one that has not ended; the page shows which. Half precision is the Trainer's automatic mixed
precision: weights, adapters and the optimizer stay in fp32 (bf16 takes a processor with AMX 0.6 of the time).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from evidence.pieces import PIECES, Piece
from evidence.results import Result, keep, kept
from ranktune.compare.command import compare_recipe
from ranktune.compare.driver import Options
from ranktune.compare.methods import parse_methods
from ranktune.recipe.schema import Precision
from stepcost.machine import Machine

console = Console()


def run(piece: Piece, options: Options, precision: Precision, jobs: int, report_only: bool, note: str) -> Result:
    """Train what is missing of a piece, write its report, and put its figures together."""
    recipe = piece.recipe(os.environ["RANKTUNE_DATA"], str(options.out), precision)
    file = Path(f"{piece.name}.yaml")  # for messages only: the recipe has no file
    summary, _ = compare_recipe(recipe, file, options, console, jobs=jobs, report_only=report_only)
    # The runs themselves know what they ran on, also where they are only reported.
    accelerator = summary.machine.get("accelerator", "none")
    environment = Machine().describe() | {"device_name": None if accelerator == "none" else accelerator}
    return Result(piece.name, environment, summary, note, precision)


def show() -> None:
    """The pieces and what is on file."""
    results = {result.piece: result for result in kept()}
    table = Table("piece", "what", "methods", "seeds", "results")
    for piece in PIECES.values():
        result = results.get(piece.name)
        have = "" if result is None else f"{len(result.summary.methods)} methods, {len(result.summary.seeds)} seeds"
        table.add_row(piece.name, piece.title, str(len(parse_methods(piece.methods))), str(piece.seeds), have)
    console.print(table)


def main(
    pieces: Annotated[list[str] | None, typer.Argument(help="Which; without any, they are listed.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these; None is the piece's own.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Fewer or more; None is the piece's own number.")] = None,
    search_seeds: Annotated[int, typer.Option(min=1, help="Runs that a learning rate is judged by.")] = 1,
    precision: Annotated[Precision, typer.Option(help="What the runs compute in.")] = "fp32",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Where runs and reports go.")] = Path("runs/glue"),
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Keep the figures of the runs that have ended; train nothing.")
    ] = False,
    note: Annotated[str, typer.Option(help="A remark that is kept with the figures and shown on the page.")] = "",
) -> None:
    """Run pieces of the benchmark, or list them."""
    if not pieces:
        show()
        return
    if unknown := [name for name in pieces if name not in PIECES]:
        raise typer.BadParameter(f"{unknown[0]!r} is no piece; without arguments they are listed.")
    if "RANKTUNE_DATA" not in os.environ:
        raise typer.BadParameter("set RANKTUNE_DATA to the folder that holds glue/.")
    for name in pieces:
        piece = PIECES[name]
        options = Options(
            methods=parse_methods(methods or piece.methods),
            seeds=seeds or piece.seeds,
            out=out.absolute() / name,
            search_seeds=search_seeds,
        )
        result = run(piece, options, precision, jobs, report_only, note)
        console.print(f"kept: {keep(result)}")


if __name__ == "__main__":
    typer.run(main)
