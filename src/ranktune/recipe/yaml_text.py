"""YAML in and out: safe loading with the number and boolean rules of YAML 1.2, and no duplicate keys."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ranktune.errors import RecipeError

_BOOLEAN = "tag:yaml.org,2002:bool"
_FLOAT = "tag:yaml.org,2002:float"


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text and `no` as false: both surprise people, so both follow YAML 1.2 here."""


class _RecipeDumper(yaml.SafeDumper):
    """Quotes whatever either YAML would read as something else than text."""


_TRUE_OR_FALSE = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_NUMBER = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(_BOOLEAN, _TRUE_OR_FALSE, list("tTfF"))
for side in (_RecipeLoader, _RecipeDumper):
    side.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789."))


def _mapping(loader: _RecipeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, (list, dict, set)):
            raise RecipeError(f"line {line}: a key must be a word, not {key!r}.")
        if key in seen:
            raise RecipeError(f"line {line}: the key '{key}' is already set on line {seen[key]}; keep one of the two.")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


def _construct_mapping(loader: _RecipeLoader, node: yaml.MappingNode) -> Any:
    values: dict[Any, Any] = {}
    yield values
    values.update(_mapping(loader, node))


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse(text: str) -> Any:
    """The plain values in a YAML text.

    Raises:
        RecipeError: the text is not YAML, uses tags beyond plain values, or sets a key twice.
    """
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader: plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{place}not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}.") from error


def write(values: Any) -> str:
    """YAML text, keys in the order given; plain `yaml.safe_load` and `parse` read the same values from it."""
    return yaml.dump(values, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
