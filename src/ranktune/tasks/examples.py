"""Check the examples of a split row by row, and turn their labels into numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets

from ranktune.errors import DataError
from ranktune.tasks.chat import problem_with
from ranktune.tasks.labels import class_names, class_numbers, measurements
from ranktune.tasks.replacement import replacer
from ranktune.tasks.roles import check_columns
from ranktune.tasks.tokenization import map_rows


def take_roles(
    dataset: datasets.Dataset,
    roles: Mapping[str, str],
    task: str,
    split: str,
    *,
    skip_incomplete: bool = False,
    replace: Mapping[str, Mapping[str, str]] | None = None,
) -> datasets.Dataset:
    """Return the split with only the columns that play a role, named by it, their texts checked.

    `skip_incomplete`: leave out rows with nothing in one of the columns, instead of refusing them. `replace`:
    role -> what to replace in its texts. Raises DataError, with the row, for a text that is missing, empty or
    no text. A plain corpus may have empty rows: they are the blank lines between its paragraphs.
    """
    check_columns(roles, dataset.column_names, f" in the {split} split")
    if len(dataset) == 0:
        raise DataError(f"data.{split}: the {split} split has no examples.")
    chosen = dataset.select_columns(list(roles.values())).rename_columns(
        {column: role for role, column in roles.items() if column != role}
    )
    may_be_empty = {"text"} if task == "causal-lm" else set()
    if skip_incomplete:
        chosen = _complete(chosen, set(roles) - may_be_empty, split)
    for role, column in roles.items():
        if role == "label":
            continue
        for row, value in enumerate(chosen[role], start=1):
            if role == "messages":
                _check_messages(value, row, column, split)
            else:
                _check_text(value, row, column, split, may_be_empty=role in may_be_empty)
    for role, table in (replace or {}).items():
        if table:
            chosen = _replaced(chosen, role, replacer(table))
    return chosen


def label_train(
    train: datasets.Dataset, task: str, order: Sequence[str] | None
) -> tuple[datasets.Dataset, list[str] | None]:
    """Return the training split with numbers as labels, and the class names for classification.

    Raises DataError for a label that is missing or unusable.
    """
    if order is not None and task != "classification":
        raise DataError(f"data.labels: only classification has classes; the task is '{task}'.")
    names = None
    if task == "classification":
        names = class_names(_label_values(train), order or _class_order(train), "train")
    return label_like_train(train, task, names, "train"), names


def label_like_train(
    dataset: datasets.Dataset, task: str, names: Sequence[str] | None, split: str = "evaluation"
) -> datasets.Dataset:
    """Return the split with the numbers that training has for the same labels.

    Raises DataError for an unusable label and for a class that training does not have.
    """
    if names is not None:
        return _with_labels(dataset, class_numbers(_label_values(dataset), names, split), datasets.Value("int64"))
    if task == "regression":
        return _with_labels(dataset, measurements(dataset["label"], split), datasets.Value("float32"))
    return dataset


def _label_values(dataset: datasets.Dataset) -> list[Any]:
    """Return the labels as their source means them.

    The hub's class numbers by name, its -1 (hidden) as missing.
    """
    feature = dataset.features["label"]
    values = list(dataset["label"])
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return values


def _class_order(train: datasets.Dataset) -> list[str] | None:
    """The order that a data set of the hub declares: scores like F1 depend on which class is the second."""
    feature = train.features["label"]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _complete(dataset: datasets.Dataset, roles: set[str], split: str) -> datasets.Dataset:
    """The rows that have something in every role that needs it."""
    columns = [dataset[role] for role in dataset.column_names if role in roles]
    full = [row for row, cells in enumerate(zip(*columns, strict=True)) if not any(map(_is_blank, cells))]
    if columns and not full:
        raise DataError(f"data.skip_incomplete: every example of the {split} split is incomplete, so none is left.")
    return dataset.select(full) if columns else dataset


def _is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _replaced(dataset: datasets.Dataset, role: str, replaced: Callable[[str], str]) -> datasets.Dataset:
    def change(cell: Any) -> Any:
        if isinstance(cell, str):
            return replaced(cell)
        return [{**message, "content": replaced(message["content"])} for message in cell]

    return map_rows(dataset, lambda rows: {role: [change(cell) for cell in rows[role]]})


def _check_messages(value: Any, row: int, column: str, split: str) -> None:
    problem = problem_with(value)
    if problem is not None:
        raise DataError(f"data: row {row} of the {split} split {problem} (column '{column}').")


def _check_text(value: Any, row: int, column: str, split: str, *, may_be_empty: bool) -> None:
    where = f"row {row} of the {split} split"
    if value is None:
        raise DataError(f"data: {where} has nothing in the column '{column}'. Fill it or remove the row.")
    if not isinstance(value, str):
        raise DataError(
            f"data: {where} has a {type(value).__name__} in the column '{column}', which should hold text. Choose "
            "another column in data.columns."
        )
    if not may_be_empty and not value.strip():
        raise DataError(f"data: {where} has an empty text in the column '{column}'. Fill it or remove the row.")


def _with_labels(dataset: datasets.Dataset, labels: Sequence[float], kind: datasets.Value) -> datasets.Dataset:
    return dataset.remove_columns("label").add_column("label", list(labels), feature=kind)
