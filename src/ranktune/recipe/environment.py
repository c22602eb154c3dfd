"""`${NAME}` in a recipe's places: so that a recipe can be shared between machines that keep their data elsewhere."""

from __future__ import annotations

import os
import re

from ranktune.errors import RecipeError, did_you_mean
from ranktune.recipe.schema import Recipe

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def with_environment(recipe: Recipe, file: str) -> Recipe:
    """The recipe with every `${NAME}` in a place (`model`, `method.init_from`, `data.source`, `output`) replaced.

    Raises:
        RecipeError: a variable is not set.
    """
    source = _expanded(recipe.data.source, "data.source", file)
    method, start = recipe.method, recipe.method.get("init_from")
    if isinstance(start, str):
        method = {**method, "init_from": _expanded(start, "method.init_from", file)}
    return recipe.model_copy(
        update={
            "model": _expanded(recipe.model, "model", file),
            "method": method,
            "data": recipe.data.model_copy(update={"source": source}),
            "output": _expanded(recipe.output, "output", file),
        }
    )


def _expanded(place: str, key: str, file: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise RecipeError(
                f"{file}: '{key}' is '{place}', and the environment variable {name} is not "
                f"set.{did_you_mean(name, os.environ)} Set it before the command ({name}=... ranktune ...), or give "
                f"the place itself: {key}=..."
            )
        return os.environ[name]

    return _VARIABLE.sub(value, place)
