"""What commands print through, and the warning that two of them give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


def standard_output() -> Console:
    """Standard output. In a file or a pipe there is no edge at which module names would have to be broken."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def warn_unless_same_data(same: bool) -> None:
    """Say on stderr that scores are of other data than the run's own."""
    if not same:
        typer.echo(
            "warning: the data is not the data this run was trained and scored on (its fingerprint changed), "
            "so the scores are not comparable with the run's own.",
            err=True,
        )
