"""The three places examples come from: the embedded set, local files, and data sets on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from datasets.exceptions import DatasetGenerationError

from ranktune.errors import DataError, RecipeError, did_you_mean
from ranktune.tasks.docstrings import docstrings, in_evaluation
from ranktune.tasks.files import EVALUATION_NAMES, FORMATS, TRAIN_NAMES, choose_split, columns_of, locate, read
from ranktune.tasks.paths import looks_like_path, missing
from ranktune.tasks.roles import assign, candidates

if TYPE_CHECKING:
    from ranktune.recipe import DataRecipe

EMBEDDED_SOURCE = "stdlib-docstrings"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_ONLY_FOR_FILES = ("train", "evaluation", "columns", "labels", "config", "revision")


@dataclass(frozen=True)
class RawData:
    """Examples as their source has them.

    `evaluation` is None when it must be split off. `origin`: for humans.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    origin: str


def check_place(recipe: DataRecipe) -> None:
    """Raise DataError or RecipeError when it shows without loading that the source cannot be loaded."""
    if recipe.source == EMBEDDED_SOURCE:
        _check_embedded(recipe)
    elif _is_local(recipe.source):
        _check_files(recipe)


def load_source(recipe: DataRecipe) -> RawData:
    """Load the examples from where the recipe says. Raises DataError when that fails."""
    if recipe.source == EMBEDDED_SOURCE:
        return _embedded(recipe)
    if not _is_local(recipe.source):
        return _hub(recipe)
    files = locate(recipe)
    evaluation = read(files.evaluation, recipe) if files.evaluation else None
    return RawData(read(files.train, recipe), evaluation, Path(recipe.source).name)


def _is_local(source: str) -> bool:
    """Whether the source is a file or folder, not a hub name. Raises DataError for what can be neither."""
    if Path(source).expanduser().exists():
        return True
    if looks_like_path(source) or _HUB_NAME.fullmatch(source) is None or Path(source).suffix.lower() in FORMATS:
        raise DataError(f"data.source: {missing(Path(source).expanduser())}")
    if "/" not in source and (hint := did_you_mean(source, [EMBEDDED_SOURCE])):
        raise DataError(f"data.source: '{source}' is not a file or folder.{hint}")
    return False


def _check_embedded(recipe: DataRecipe) -> None:
    if recipe.task not in (None, "classification"):
        raise RecipeError(f"data.task: '{EMBEDDED_SOURCE}' is for classification, not '{recipe.task}'.")
    for field in _ONLY_FOR_FILES:
        if getattr(recipe, field):
            raise RecipeError(f"data.{field}: '{EMBEDDED_SOURCE}' has its own; leave it out, or set data.source.")


def _check_files(recipe: DataRecipe) -> None:
    for field in ("config", "revision"):
        if getattr(recipe, field):
            raise RecipeError(
                f"data.{field}: only for data sets on the hub; '{recipe.source}' is a local file or folder."
            )
    files = locate(recipe)
    for split in (files.train, files.evaluation):
        names = columns_of(split, recipe) if split else None
        if names is None:
            continue
        if recipe.task is not None:
            assign(recipe.task, recipe.columns, names)
        else:
            candidates(recipe.columns, names)


def _embedded(recipe: DataRecipe) -> RawData:
    splits: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for example in docstrings():
        row = {"text": example.text, "label": example.chapter}
        splits[in_evaluation(example.text, recipe.evaluation_fraction)].append(row)
    for rows in splits.values():
        if not rows:
            raise DataError(
                f"data.evaluation_fraction: {recipe.evaluation_fraction} leaves one split without examples."
            )
    train, evaluation = datasets.Dataset.from_list(splits[False]), datasets.Dataset.from_list(splits[True])
    return RawData(train, evaluation, "docstrings of the standard library")


def _hub(recipe: DataRecipe) -> RawData:
    try:
        loaded = datasets.load_dataset(recipe.source, recipe.config, revision=recipe.revision)
    except (OSError, ValueError, DatasetGenerationError) as error:  # connection and hub errors are OSErrors
        raise DataError(
            f"data.source: '{recipe.source}' is not a local file or folder, and loading it from the hub failed: {error}"
        ) from error
    splits = {str(name): split for name, split in loaded.items()}
    train = choose_split(splits, recipe.train, TRAIN_NAMES)
    evaluation = choose_split(splits, recipe.evaluation, EVALUATION_NAMES)
    for role, asked, chosen in (
        ("train", recipe.train, train),
        ("evaluation", recipe.evaluation, evaluation),
    ):
        if chosen is None and (asked is not None or role == "train"):
            hint = did_you_mean(asked, splits) if asked else ""
            raise DataError(
                f"data.{role}: '{recipe.source}' has no split '{asked or role}'.{hint} It has: {', '.join(splits)}."
            )
    if evaluation == train:
        raise DataError(f"data.evaluation: '{evaluation}' is the training split too; choose another.")
    return RawData(splits[train or ""], splits[evaluation] if evaluation else None, recipe.source)
