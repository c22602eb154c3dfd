"""JSON files that are one object, like `{"word": "its sounds", ...}`: every entry is an example."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, Features, Value

from ranktune.errors import DataError

COLUMNS = ("key", "value")


def read_dictionary(file: Path) -> Dataset | None:
    """The entries of a JSON file that is one object, in the columns `key` and `value`, both text.

    An entry whose value is itself a list or an object, or null, has nothing in `value`. None for every other file: a
    list of rows, one row a line, or an object of nothing but lists and objects.

    Raises:
        DataError: the file is not text.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        return None  # rows on lines, or broken: the ordinary reader tells
    except UnicodeDecodeError as error:
        raise DataError(f"data.source: '{file.name}' cannot be read as json: {error}") from error
    if not isinstance(content, dict) or not any(isinstance(value, (str, int, float)) for value in content.values()):
        return None
    key, value = COLUMNS
    cells = [_text(cell) for cell in content.values()]
    return Dataset.from_dict(
        {key: list(content), value: cells}, features=Features({name: Value("string") for name in COLUMNS})
    )


def _text(value: object) -> str | None:
    return None if value is None or isinstance(value, (list, dict)) else str(value)
