"""Labels: whether they are classes or measurements, the order of the classes, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from ranktune.errors import DataError, did_you_mean

MAX_OBVIOUS_CLASSES = 200


def task_of(values: Sequence[Any]) -> str | None:
    """Return "classification" for a few repeated strings or whole numbers, "regression" for decimals.

    None when it is not obvious: many different whole numbers or strings.
    """
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers) and any(isinstance(number, float) for number in numbers):
        return "regression"
    classes = len(set(values))
    return "classification" if classes <= MAX_OBVIOUS_CLASSES and 2 * classes <= len(values) else None


def class_names(values: Iterable[Any], order: Sequence[str] | None, split: str) -> list[str]:
    """Return the class names in the order of their numbers: `order`, or sorted (as numbers when all are).

    Raises DataError when there are fewer than two, when `order` repeats one or lacks one that occurs.
    """
    found = dict.fromkeys(class_name(value, row, split) for row, value in enumerate(values, start=1))
    names = list(order) if order is not None else _sorted(found)
    if len(set(names)) < len(names):
        raise DataError(f"data.labels: a class is listed twice: {names}.")
    if order is not None:
        unlisted = next((name for name in found if name not in names), None)
        if unlisted is not None:
            raise DataError(
                f"data.labels: the {split} split has the label '{unlisted}', which is not "
                f"listed.{did_you_mean(unlisted, names)} Listed: {', '.join(names)}."
            )
    if len(names) < 2:
        raise DataError(f"data.columns.label: classification needs two classes; the {split} split has only {names}.")
    return names


def class_name(value: Any, row: int, split: str) -> str:
    """Return the class a cell stands for.

    Raises DataError for a missing one and for a number that is not whole.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"data.columns.label: row {row} of the {split} split has no label.")
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"data.columns.label: row {row} of the {split} split has the label {value}; classes are strings or "
                "whole numbers. For measurements set data.task: regression."
            )
        return str(int(value))
    if not isinstance(value, (str, int)):
        raise DataError(
            f"data.columns.label: row {row} of the {split} split has a label of type {type(value).__name__}; "
            "classes are strings or whole numbers."
        )
    return str(value)


def class_numbers(values: Iterable[Any], names: Sequence[str], split: str) -> list[int]:
    """Return the number of every label. Raises DataError, naming it, for a label that is not in `names`."""
    numbers = {name: number for number, name in enumerate(names)}
    encoded = []
    for row, value in enumerate(values, start=1):
        name = class_name(value, row, split)
        if name not in numbers:
            raise DataError(
                f"data.columns.label: row {row} of the {split} split has the label '{name}', which training does "
                f"not have.{did_you_mean(name, names)} Known: {', '.join(names)}. List all classes in data.labels "
                "if it is right."
            )
        encoded.append(numbers[name])
    return encoded


def measurements(values: Iterable[Any], split: str) -> list[float]:
    """Return every label as a finite float. Raises DataError, with the row, for anything else."""
    encoded = []
    for row, value in enumerate(values, start=1):
        number = _number(value)
        if number is None or not isfinite(number):
            raise DataError(
                f"data.columns.label: row {row} of the {split} split has the label {value!r}; regression needs numbers."
            )
        encoded.append(float(number))
    return encoded


def _sorted(names: Iterable[str]) -> list[str]:
    whole = {name: _number(name) for name in names}
    if all(isinstance(number, int) for number in whole.values()):
        return sorted(whole, key=lambda name: (int(name), name))
    return sorted(whole)


def _number(value: Any) -> int | float | None:
    """The number a cell holds or spells; None for anything else, booleans and missing values included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None
