"""The errors ranktune raises on purpose. Each message names the field or module, shows the value and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RanktuneError(Exception):
    """Base class: catching it catches everything ranktune refuses by itself."""


class ConfigError(RanktuneError, ValueError):
    """A field of an adapter configuration, or a combination of fields, cannot work."""


class RecipeError(RanktuneError, ValueError):
    """A recipe or a command line override has an unknown key, a wrong type or an impossible value."""


class DataError(RanktuneError, ValueError):
    """The training or evaluation data is missing, empty, or does not have the columns the task needs."""


class AdapterFileError(RanktuneError, ValueError):
    """A saved adapter is missing, torn, contradictory, or holds something that is not data; nothing was loaded."""


class ExportError(RanktuneError, RuntimeError):
    """An exported file does not do what the adapter does; it was not kept."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string when none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
