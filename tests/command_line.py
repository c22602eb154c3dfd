"""The command line as tests call it: in this process, every argument turned into a word."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from ranktune.cli import app


def command(*arguments: object) -> Result:
    """Run `ranktune ARGUMENTS`: its exit code, standard output and standard error."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
