"""`approximate="mean_gate"` for exporting and merging: the adapter that is written where the trained one cannot be."""

from __future__ import annotations

from ranktune.errors import ConfigError, did_you_mean
from ranktune.static_mixture import MeanGate, mean_gate
from ranktune.verification.opening import Opened

APPROXIMATIONS = ("mean_gate",)


def check_approximation(approximate: str | None) -> None:
    """Raises ConfigError for a word that names no approximation."""
    if approximate is not None and approximate not in APPROXIMATIONS:
        raise ConfigError(
            f"approximate={approximate!r} must be {' or '.join(map(repr, APPROXIMATIONS))}, which replaces a mor "
            f"adapter by its router's mean decision.{did_you_mean(approximate, APPROXIMATIONS)}"
        )


def activate_approximation(opened: Opened, approximate: str | None) -> MeanGate | None:
    """Put the approximating adapter on an opened model and make it the active one; without one, do nothing.

    It is made from the opened model's inputs, and its error is measured on them.

    Raises:
        ConfigError: the adapter needs no approximation of this kind.
    """
    if approximate is None:
        return None
    found = mean_gate(opened.model, [opened.batch])
    opened.model.set_adapter(found.adapter_name)
    return found
