"""What the user's input caused is one message and an exit code, not a traceback."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import typer

from ranktune.errors import RanktuneError

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130


def refusals_are_messages(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what the user's input caused into one message on stderr and exit code 2; anything else stays a traceback.

    For every command; it reads the command's ``debug``.
    """

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except RanktuneError as error:
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return run
