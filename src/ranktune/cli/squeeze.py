"""`ranktune squeeze`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.console import standard_output
from ranktune.cli.options import Debug, Json, Profile, ProfileName, Quiet


def squeeze(
    trained: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="The folder of an adapter, ours or stock PEFT's, or a run's output directory.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="What may be kept: rank=64 and params=100000 are of all modules together, energy=90% is of the "
            "updates' squared norm.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to make. Default: such as ADAPTER-rank64.", show_default=False),
    ] = None,
    profile: Profile = ProfileName.compact,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the factors: float32, bfloat16 or float16. Default: that of the adapter, at least float32.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Compare outputs on this base model: a folder, a hub name, all-minilm. A run knows its own.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="With --base: inputs to compare on, one text a line.", show_default=False),
    ] = None,
    outputs: Annotated[bool, typer.Option(help="Compare outputs, where the base model and data are known.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Recompress a trained adapter: a plain LoRA whose ranks are chosen for it under one budget.

    Each update is taken by its singular values, which needs its factors alone,
    neither its base model nor a dense matrix; of all modules together the
    components with the most energy are kept, and modules with none are left
    out. A weight-decomposed adapter stays one, with at least one component in
    every module.

    [bold]Examples[/bold]

        ranktune squeeze runs/first --budget rank=64

        ranktune squeeze adapters/someone-elses --budget energy=95% --out adapters/small

        ranktune squeeze adapters/someone-elses --budget params=500000 --base all-minilm --texts mine.txt
    """
    from ranktune.report.squeezing import squeezed_lines, squeezed_table
    from ranktune.run.directory import folder_beside
    from ranktune.squeezed_run import budget_of, squeeze_trained

    wanted = budget_of(budget)
    ending = "".join(character for character in budget if character.isalnum() or character == ".")
    folder = out or folder_beside(trained, ending)
    result = squeeze_trained(
        trained, folder, wanted, profile.value, dtype=dtype, base=base, texts=texts, outputs=outputs
    )
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    elif not quiet:
        standard_output().print(squeezed_table(result.squeezed))
        for line in squeezed_lines(result, folder, trained):
            typer.echo(line)
