"""Points that have been measured, one file each: a study that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ranktune.run.atomic import write_json
from stepcost.machine import Machine

# What has to be the same for two points to belong to one sweep.
_OF_THE_MACHINE = ("versions", "processor", "device_name")


@dataclass(frozen=True)
class Point:
    """One value of one axis, and everything that its figures depend on but the machine.

    Attributes:
        axis, value: where it is. part: what is measured there. question: how, as plain data.
    """

    axis: str
    value: int
    part: str
    question: dict[str, Any]


class Points:
    """The points in a folder."""

    def __init__(self, folder: Path, machine: Machine, *, fresh: bool = False) -> None:
        self.folder = folder
        self.machine = machine
        self.fresh = fresh

    def kept(self, point: Point) -> dict[str, Any] | None:
        """What was measured of just this point, on this machine with these versions; None if nothing was."""
        path = self._path(point)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        here = self.machine.describe()
        same = found["question"] == json.loads(json.dumps(point.question))
        return found if same and all(found["environment"][key] == here[key] for key in _OF_THE_MACHINE) else None

    def measured(self, point: Point, measure: Callable[[], Sequence[Any]]) -> dict[str, Any]:
        """The kept point, or a new one: ``measure`` gives its rows, which are data classes."""
        found = None if self.fresh else self.kept(point)
        if found is not None:
            return found
        environment = self.machine.describe()
        rows = [{"value": point.value, **asdict(row)} for row in measure()]
        path = self._path(point)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"question": point.question, "environment": environment, "rows": rows})
        return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, point: Point) -> Path:
        return self.folder / "points" / f"{point.axis}-{point.value}-{point.part}.json"
