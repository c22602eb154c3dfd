"""Results that are kept with the source: one JSON file per piece, with the machine, the versions and the date."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ranktune.compare.summary import Summary
from ranktune.run.atomic import write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
_SUMMARY = TypeAdapter(Summary)


@dataclass(frozen=True)
class Result:
    """What is kept of one comparison.

    Attributes:
        piece: its name. environment: where and when it ran. summary: its figures. note: a remark on them.
        precision: what its runs computed in.
    """

    piece: str
    environment: dict[str, Any]
    summary: Summary
    note: str = ""
    precision: str = "fp32"


def keep(result: Result, folder: Path = RESULTS) -> Path:
    """Write a result; the file's path. Nothing in it names a folder of the machine."""
    # The recipe, which names the folder of the data, is the piece's.
    summary = asdict(result.summary) | {"model": Path(result.summary.model).name, "recipe": ""}
    path = folder / "glue" / f"{result.piece}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(result) | {"summary": summary})
    return path


def kept(folder: Path = RESULTS) -> Iterator[Result]:
    """Every result on file, by name."""
    for path in sorted((folder / "glue").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        yield Result(**found | {"summary": _SUMMARY.validate_python(found["summary"])})
