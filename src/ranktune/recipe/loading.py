"""From a YAML file and command line overrides to a checked `Recipe`, with errors that name the key and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ranktune.errors import RecipeError, did_you_mean
from ranktune.recipe import yaml_text
from ranktune.recipe.environment import with_environment
from ranktune.recipe.overrides import apply_overrides
from ranktune.recipe.schema import KNOWN_ELSEWHERE, SECTIONS, Recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides and check every key and value.

    In the places that name a file or folder (`model`, `method.init_from`, `data.source`, `output`), `${NAME}` stands
    for an environment variable. The result is complete: the method's and the training's defaults are written out, and
    a local model, data folder or adapter to start from is absolute, so that the run can be repeated from another
    working directory.

    Raises:
        RecipeError: the file is missing or not YAML; a key is unknown; a value has the wrong type or is impossible;
            an environment variable is not set.
        ConfigError: the method's configuration class refuses its fields.
    """
    path, overrides = Path(path), list(overrides)
    values = _read(path)
    values, touched = apply_overrides(values, overrides)
    values.setdefault("output", f"runs/{path.stem}")
    recipe = with_environment(_validated(values, str(path), touched), str(path))
    # Here, not at the top: naming a method's fields loads torch and peft, and a mistyped key needs neither.
    from ranktune.recipe.choices import checked_trainer_fields, complete_method

    checked_trainer_fields(recipe.train, _sources("train", path, overrides))
    method = {name: _place(value) if name == "init_from" else value for name, value in recipe.method.items()}
    method = complete_method(method, _sources("method", path, overrides))
    return recipe.model_copy(
        update={
            "model": _absolute_if_local(recipe.model),
            "method": method,
            "data": recipe.data.model_copy(update={"source": _absolute_if_local(recipe.data.source)}),
        }
    )


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads the same recipe from it."""
    return yaml_text.write(recipe.resolved())


def _sources(section: str, path: Path, overrides: list[str]) -> str:
    """Where the values of a section come from, for messages."""
    said = [text for text in overrides if text.split("=")[0].split(".")[0].strip() == section]
    return f"{path} with {', '.join(said)}" if said else str(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = [found.name for found in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"there is no recipe file {path}.{did_you_mean(path.name, near)}")
    try:
        values = yaml_text.parse(path.read_text(encoding="utf-8"))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}.") from error
    if values is None:
        raise RecipeError(f"{path} is empty; a recipe sets at least `method`, for example `method: lora`.")
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, not {type(values).__name__} {values!r:.60}.")
    return values


def _validated(values: Mapping[str, Any], file: str, touched: set[str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, touched) for detail in error.errors(include_url=False)]
    raise RecipeError(f"{file}: " + f"\n{file}: ".join(lines))


def _explain(detail: ErrorDetails, touched: set[str]) -> str:
    parts = [str(part) for part in detail["loc"]]
    key = ".".join(parts)
    where = " (set on the command line)" if any(key == t or key.startswith(f"{t}.") for t in touched) else ""
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{where}.{suggest_key(parts)}"
    if detail["type"] == "missing":
        return f"'{key}' is missing; {_EXAMPLES.get(key, 'set it')}."
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    choices = re.findall(r"'([^']+)'", str(detail.get("ctx", {}).get("expected", "")))
    value = detail["input"]
    closest = did_you_mean(value, choices) if isinstance(value, str) else ""
    got = "" if isinstance(value, dict) else f", not {value!r}"
    return f"'{key}'{where}: {message}{got}.{closest}"


_EXAMPLES = {"method": "for example `method: {name: lora, r: 8}`"}


def suggest_key(parts: list[str]) -> str:
    """A did-you-mean for the unknown dotted key: in its own section first, then anywhere in a recipe."""
    section, word = ".".join(parts[:-1]), parts[-1]
    prefix = f"{section}." if section else ""
    known = list(SECTIONS[section].model_fields) if section in SECTIONS else []
    if word not in KNOWN_ELSEWHERE and (near := did_you_mean(word, known)):
        return near.replace("'", f"'{prefix}", 1)
    everywhere = {name: f"{part}.{name}".lstrip(".") for part, model in SECTIONS.items() for name in model.model_fields}
    if elsewhere := KNOWN_ELSEWHERE.get(word) or everywhere.get(word):
        return f" Did you mean '{elsewhere}'?"
    return f" Known keys: {', '.join(prefix + name for name in known)}." if known else ""


def _place(value: Any) -> Any:
    return _absolute_if_local(value) if isinstance(value, str) else value


def _absolute_if_local(name: str) -> str:
    """A name that is a file or folder here is one everywhere; "all-minilm" or a hub name stays as it is."""
    place = Path(name).expanduser()
    return str(place.resolve()) if place.exists() else name
