"""Entries of a configuration that match no module of the model: what was asked for would silently not be done.

PEFT takes a list of targets of which any entry matches, warns about patterns, and says nothing of the rest.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable

from ranktune.config import RankConfig
from ranktune.errors import ConfigError, did_you_mean
from ranktune.peft_compat import UnmatchedTargetError

# PEFT itself adds these to ``modules_to_save`` by the task, whichever of them a model has.
_HEADS = frozenset({"classifier", "score", "qa_outputs"})


def refuse_unmatched(config: RankConfig, names: Collection[str], linear: Collection[str]) -> None:
    """Check the lists and patterns of a configuration against the modules of a model.

    Saved configs pass: they may name modules that only the model they were trained on had.

    Args:
        names: of the model's own modules. linear: of those that can be adapted.

    Raises:
        UnmatchedTargetError: an entry of ``target_modules`` matches nothing; the message suggests the closest name.
        ConfigError: a layer does not exist, or a pattern's key is no regular expression.

    Warns:
        UserWarning: the same of ``rank_pattern`` and ``alpha_pattern``, which PEFT lets pass with a warning too
            (recipes refuse them), and of ``modules_to_save``, some of which PEFT adds by itself.
    """
    if config.saved:
        return
    ends = {end for name in names for end in _ends(name)}
    listed = f"Its linear modules end in: {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}."
    if isinstance(config.target_modules, (set, list)) and (missing := sorted(set(config.target_modules) - ends)):
        raise UnmatchedTargetError(
            f"Target modules {missing} not found in the base model.{_suggestions(missing, linear)} {listed}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if missing := unmatched_keys(field, getattr(config, field) or {}, names):
            warnings.warn(
                f"{field} has {missing}, which no module of the base model is called.{_suggestions(missing, linear)} "
                f"{listed}",
                stacklevel=2,
            )
    if missing := missing_layers(config.layers_to_transform, names):
        raise ConfigError(f"layers_to_transform has {missing}, and the base model's layers are {layers_of(names)}.")
    if missing := sorted(set(config.modules_to_save or ()) - ends - _HEADS):
        warnings.warn(
            f"modules_to_save has {missing}, which no module of the base model is called: nothing is trained for it."
            f"{_suggestions(missing, ends)}",
            stacklevel=2,
        )


def unmatched_keys(field: str, pattern: Iterable[str], names: Collection[str]) -> list[str]:
    """The keys of a ``rank_pattern`` or ``alpha_pattern`` that match none of these modules, by PEFT's rule.

    Raises:
        ConfigError: a key is no regular expression.
    """
    missing = []
    for key in pattern:
        try:
            rule = re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise ConfigError(f"{field} has the key {key!r}, not a regular expression: {error}.") from error
        if not any(rule.match(name) for name in names):
            missing.append(key)
    return missing


def missing_layers(wanted: list[int] | int | None, names: Iterable[str]) -> list[int]:
    """Which of these layers have no module."""
    asked = [wanted] if isinstance(wanted, int) else wanted or []
    there = _numbers(names)
    return [layer for layer in asked if layer not in there]


def layers_of(names: Iterable[str]) -> str:
    """The numbers of a model's layers, in words."""
    there = _numbers(names)
    return f"numbered {min(there)} to {max(there)}" if there else "not numbered"


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(part) for name in names for part in name.split(".") if part.isdecimal()}


def _ends(name: str) -> Iterable[str]:
    """``a.b.c``, ``b.c`` and ``c``."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _suggestions(missing: Iterable[str], names: Iterable[str]) -> str:
    known = {name.rpartition(".")[2] for name in names}
    return "".join(did_you_mean(name.rpartition(".")[2], known) for name in missing)
