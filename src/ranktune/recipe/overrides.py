"""Command line overrides: `train.epochs=1` sets one dotted key of a recipe, its value read as YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from ranktune.errors import RecipeError
from ranktune.recipe import yaml_text


def split_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`"train.seed=1"` -> `(("train", "seed"), 1)`.

    Raises:
        RecipeError: there is no `=`, an empty part in the key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise RecipeError(f"'{text}' is not an override; write key=value, for example train.epochs=1.")
    try:
        return path, yaml_text.parse(value)
    except RecipeError as error:
        raise RecipeError(f"the value of '{text}' cannot be read: {error}") from error


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> tuple[dict[str, Any], set[str]]:
    """A copy of the recipe's values with the overrides set, and the dotted keys that they set."""
    changed, touched = copy.deepcopy(values), set()
    for text in overrides:
        path, value = split_override(text)
        _set(changed, path, value, text)
        touched.add(".".join(path))
    return changed, touched


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any, text: str) -> None:
    section = values
    for depth, part in enumerate(path[:-1], start=1):
        section[part] = _opened(section.get(part), path[:depth], text)
        section = section[part]
    section[path[-1]] = value


def _opened(inner: Any, path: tuple[str, ...], text: str) -> dict[str, Any]:
    """The section at `path`, to set a key in: a missing one is empty, and `method: dora` opens up to its long form."""
    if inner is None:
        return {}
    if isinstance(inner, str) and path == ("method",):
        return {"name": inner}
    if not isinstance(inner, dict):
        raise RecipeError(f"'{text}': {'.'.join(path)} is {inner!r}, which has no keys inside.")
    return inner
