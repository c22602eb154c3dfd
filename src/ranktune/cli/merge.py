"""`ranktune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranktune.cli.options import Approximate, Debug, Quiet, Trained


def merge(
    trained: Trained,
    out: Annotated[Path, typer.Option("--out", help="The folder to make.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: that of the base model.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    approximate: Approximate = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge a quantised base model's dequantised weights.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,  # noqa: ARG001  (read by refusals_are_messages)
) -> None:
    """Build a trained adapter into its base model: a folder that from_pretrained loads without PEFT.

    The sum is computed in float32 and cast once; the tokenizer and the
    generation settings travel along. The folder is loaded in a fresh process,
    and its outputs on real inputs are compared before it is kept. A mor adapter
    is refused, or approximated with --approximate mean_gate.

    [bold]Example[/bold]

        ranktune merge runs/first --out models/first --dtype bfloat16
    """
    from ranktune.merging import merge_trained
    from ranktune.report.exports import merge_lines

    result = merge_trained(trained, out, dtype, max_shard_size, approximate, dequantize=dequantize)
    if not quiet:
        for line in merge_lines(result, trained):
            typer.echo(line)
