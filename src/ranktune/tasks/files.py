"""Local data files.

Which files hold the two splits, how each format is read, and which columns a file has.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ranktune.errors import DataError, did_you_mean
from ranktune.tasks.dictionaries import read_dictionary
from ranktune.tasks.paths import missing

if TYPE_CHECKING:
    from ranktune.recipe import DataRecipe

# Extension -> the builder of `datasets` that reads it.
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
TRAIN_NAMES = ("train", "training")
EVALUATION_NAMES = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")

_SHARD = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00003.parquet


@dataclass(frozen=True)
class SplitFiles:
    """The files of both splits; `evaluation` is None when it must be split off the training examples."""

    train: tuple[Path, ...]
    evaluation: tuple[Path, ...] | None


def locate(recipe: DataRecipe) -> SplitFiles:
    """Find the files of a local source.

    Raises DataError when one does not exist or no file can be the training one.
    """
    source = Path(recipe.source).expanduser()
    if not source.exists():
        raise DataError(f"data.source: {missing(source)}")
    if source.is_dir():
        return _in_folder(source, recipe)
    if recipe.train is not None:
        raise DataError(f"data.train: '{recipe.train}' cannot be chosen because data.source is the file '{source}'.")
    _builder(source, "data.source")
    evaluation = None
    if recipe.evaluation is not None:
        file = source.parent / recipe.evaluation
        if not file.is_file():
            raise DataError(f"data.evaluation: {missing(file)}")
        if file.samefile(source):
            raise DataError(f"data.evaluation: '{recipe.evaluation}' is the training file too; choose another.")
        _builder(file, "data.evaluation")
        evaluation = (file,)
    return SplitFiles((source,), evaluation)


def columns_of(files: Sequence[Path], recipe: DataRecipe) -> list[str] | None:
    """Return the column names of a csv or tsv file without reading the rest, None for other formats.

    Raises DataError when the file is empty, repeats a column name or has rows longer than its header.
    """
    return _header(files[0], recipe) if FORMATS[files[0].suffix.lower()] == "csv" else None


def read(files: Sequence[Path], recipe: DataRecipe) -> Dataset:
    """Read the files of one split.

    Csv and tsv cells come as text; a JSON file that is one object has the columns `key` and `value`. Raises
    DataError when a file cannot be parsed.
    """
    builder = _builder(files[0], "data.source")
    if [file.suffix.lower() for file in files] == [".json"] and (entries := read_dictionary(files[0])):
        return entries
    options: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
    if builder == "csv":
        options = _csv_options(files, recipe)
    try:
        return load_dataset(builder, data_files={"train": [str(file) for file in files]}, split="train", **options)
    except (DatasetGenerationError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().rstrip(".")
        raise DataError(
            f"data.source: {_names(files)} cannot be read as {_format(files[0], builder)}: {reason}."
            f"{_quoting_advice(files, recipe, builder)}"
        ) from error


def _quoting_advice(files: Sequence[Path], recipe: DataRecipe, builder: str) -> str:
    """What to try where quotation marks may be part of the text, found by trying it."""
    if builder != "csv" or not recipe.quoting:
        return ""
    try:
        read(files, recipe.model_copy(update={"quoting": False}))
    except DataError:
        return ""
    return " With its quotation marks as part of the text it can be read: try data.quoting: false."


def _format(file: Path, builder: str) -> str:
    """The format by the name that its files go by."""
    return "tsv" if file.suffix.lower() == ".tsv" else builder


def choose_split(names: Iterable[str], asked: str | None, usual: Sequence[str]) -> str | None:
    """Return the split that was asked for, or else the first usual one there is; None when neither exists."""
    if asked is not None:
        return asked if asked in names else None
    return next((name for name in usual if name in names), None)


def _in_folder(folder: Path, recipe: DataRecipe) -> SplitFiles:
    splits = _splits(folder)
    if not splits:
        raise DataError(f"data.source: the folder '{folder}' holds no data file ({', '.join(FORMATS)}).")
    train = choose_split(splits, _stem(recipe.train, splits), TRAIN_NAMES)
    if train is None and recipe.train is None and len(splits) == 1:
        train = next(iter(splits))
    if train is None:
        raise DataError(_no_split("train", recipe.train, folder, splits))
    evaluation = choose_split(splits, _stem(recipe.evaluation, splits), EVALUATION_NAMES)
    if evaluation is None and recipe.evaluation is not None:
        raise DataError(_no_split("evaluation", recipe.evaluation, folder, splits))
    if evaluation == train:
        raise DataError(f"data.evaluation: '{recipe.evaluation}' is the training split too; choose another.")
    return SplitFiles(splits[train], splits[evaluation] if evaluation else None)


def _splits(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Split name -> its files.

    `train.csv`, or shards as the hub writes them, here or in the subfolder `data`.
    """
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else []:
            if file.is_file() and file.suffix.lower() in FORMATS:
                found.setdefault(_SHARD.sub("", file.stem), []).append(file)
    for name, files in found.items():
        if len(files) > 1 and not all(_SHARD.search(file.stem) for file in files):
            raise DataError(f"data.source: several files could be the split '{name}': {_names(files)}. Keep one.")
    return {name: tuple(files) for name, files in found.items()}


def _stem(asked: str | None, splits: dict[str, tuple[Path, ...]]) -> str | None:
    """`train.csv` and `train` both mean the split `train`."""
    if asked is None or asked in splits:
        return asked
    return next((name for name, files in splits.items() if any(file.name == asked for file in files)), asked)


def _no_split(role: str, asked: str | None, folder: Path, splits: dict[str, tuple[Path, ...]]) -> str:
    names = [file.name for files in splits.values() for file in files]
    if asked is None:
        return (
            f"data.{role}: no file of '{folder}' is named like the {role} split ({', '.join(TRAIN_NAMES)}). Set "
            f"data.{role} to one of: {', '.join(names)}."
        )
    return (
        f"data.{role}: '{folder}' has no file or split '{asked}'.{did_you_mean(asked, [*names, *splits])} It has: "
        f"{', '.join(names)}."
    )


def _builder(file: Path, field: str) -> str:
    builder = FORMATS.get(file.suffix.lower())
    if builder is None:
        known = ", ".join(FORMATS)
        raise DataError(f"{field}: '{file}' has the unknown extension '{file.suffix}'. Known: {known}.")
    return builder


def _csv_options(files: Sequence[Path], recipe: DataRecipe) -> dict[str, Any]:
    headers = {tuple(_header(file, recipe)) for file in files}
    if len(headers) > 1:
        raise DataError(f"data.source: the files of one split have different columns: {_names(files)}.")
    names = list(headers.pop())
    return {
        "sep": _delimiter(files[0], recipe),
        "names": names,
        "header": 0 if recipe.header else None,
        "quoting": csv.QUOTE_MINIMAL if recipe.quoting else csv.QUOTE_NONE,
        "encoding": "utf-8-sig",  # with or without a byte order mark
        # Text in, text out: pandas would guess types block by block, and take the words NA and None for missing.
        "features": Features({name: Value("string") for name in names}),
        "na_filter": False,
    }


def _header(file: Path, recipe: DataRecipe) -> list[str]:
    first, second = _first_rows(file, recipe)
    names = first if recipe.header else [f"column_{number}" for number in range(len(first))]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(
            f"data.header: '{file.name}' has two columns named '{repeated}'. Rename one, or, if the first row is "
            "already an example, set data.header: false."
        )
    if not second:
        raise DataError(f"data.source: '{file.name}' has a header but no examples.")
    if len(second) > len(names):
        # pandas would take the surplus for row names and shift every column.
        raise DataError(
            f"data.source: row 1 of '{file.name}' has {len(second)} cells, the header {len(names)}. Check "
            "data.delimiter and data.quoting."
        )
    return names


def _first_rows(file: Path, recipe: DataRecipe) -> tuple[list[str], list[str]]:
    """The first line with content, and the first example."""
    quoting = csv.QUOTE_MINIMAL if recipe.quoting else csv.QUOTE_NONE
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            rows = csv.reader(lines, delimiter=_delimiter(file, recipe), quoting=quoting)
            filled = (row for row in rows if row)
            first = next(filled, None)
            second = next(filled, []) if recipe.header else first
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"data.source: '{file.name}' cannot be read as {_format(file, 'csv')}: {error}") from error
    if first is None or second is None:
        raise DataError(f"data.source: '{file.name}' is empty.")
    return first, second


def _delimiter(file: Path, recipe: DataRecipe) -> str:
    delimiter = recipe.delimiter or ("\t" if file.suffix.lower() == ".tsv" else ",")
    if len(delimiter) != 1:
        raise DataError(f"data.delimiter: '{delimiter}' must be one character.")
    return delimiter


def _names(files: Sequence[Path]) -> str:
    return ", ".join(f"'{file.name}'" for file in files)
