"""`ranktune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.options import Approximate, Debug, Profile, ProfileName, Quiet, Trained


def export(
    trained: Trained,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The folder to make. Default: such as OUT-uniform or OUT-compact-rank4.", show_default=False
        ),
    ] = None,
    profile: Profile = ProfileName.uniform,
    rank: Annotated[
        int | None, typer.Option(help="Of a nested adapter (dylora): the rank to cut it at.", show_default=False)
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option(help="Approximate by a LoRA of at most this rank per module.", show_default=False),
    ] = None,
    approximate: Approximate = None,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Write a trained adapter as plain LoRA, for PEFT, vLLM, TGI, llama.cpp and others.

    The result is loaded in a fresh process by stock PEFT, without ranktune,
    and its outputs on real inputs are compared before it is kept. The uniform
    profile (one rank, filled with zeros) is exact in every engine; compact
    keeps each module's own rank, for PEFT and diffusers. A weight-decomposed
    adapter becomes a PEFT DoRA, or with --svd-rank a LoRA with a known error.
    A mor adapter is refused, or approximated with --approximate mean_gate.

    [bold]Examples[/bold]

        ranktune export runs/first

        ranktune export runs/first --profile compact --out adapters/first
    """
    from ranktune.exporting import export_trained
    from ranktune.report.exports import export_lines
    from ranktune.run.directory import folder_beside

    cut = [f"{word}{value}" for word, value in (("rank", rank), ("svd", svd_rank)) if value is not None]
    folder = out or folder_beside(trained, "-".join([profile.value, *cut]))
    result = export_trained(trained, folder, profile.value, rank, svd_rank, approximate)
    if not quiet:
        for line in export_lines(result, folder, trained):
            typer.echo(line)
