"""The options and arguments that several commands share, as types."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a refusal.", rich_help_panel="Output")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel="Output")]


class ProfileName(str, Enum):
    """How an exported file is laid out."""

    uniform = "uniform"
    compact = "compact"


class SplitName(str, Enum):
    """Which examples to score on."""

    evaluation = "evaluation"
    train = "train"


Profile = Annotated[ProfileName, typer.Option(help="One rank for all modules, or its own rank for each.")]

Finished = Annotated[Path, typer.Argument(metavar="OUT", help="A run's output directory.", show_default=False)]
Trained = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="A run's output directory, or the folder of an adapter.", show_default=False),
]

Approximate = Annotated[
    str | None,
    typer.Option(
        help="mean_gate: of a mor adapter, which no weight can hold, what its router decides in the mean.",
        show_default=False,
    ),
]
