"""How far a grid is, and how long it may still take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ranktune.compare.grid import Run
from ranktune.run.display import clock


def seconds_left(
    wanted: Sequence[Run], records: Mapping[str, Mapping[str, Any]], fractions: Mapping[str, float], at_a_time: int
) -> float | None:
    """What the runs without a record should still take, from those that have one; None before the first has ended.

    A run is expected to take as long as the finished ones of its method and phase, else of its phase, else of any.

    Args:
        fractions: how much of a run in training is done, by its name.
        at_a_time: runs in training at a time.
    """
    taken = [
        (record["comparison"]["label"], record["comparison"]["phase"], record["run_info"]["total_time"])
        for record in records.values()
        if record["train_info"]["status"] != "failed"
    ]
    if not taken:
        return None

    def expected(run: Run) -> float:
        same = [seconds for label, phase, seconds in taken if (label, phase) == (run.label, run.phase)]
        alike = [seconds for _, phase, seconds in taken if phase == run.phase]
        return mean(same or alike or [seconds for *_, seconds in taken])

    left = sum(expected(run) * (1.0 - fractions.get(run.id, 0.0)) for run in wanted if run.id not in records)
    return left / max(1, at_a_time)


def result_line(run: Run, record: Mapping[str, Any], done: int, total: int, left: float | None) -> str:
    """One line for a run that has ended."""
    own, info = record["comparison"], record["train_info"]
    words = f"{own['metric']} {own['score']:.4f}" if own["score"] is not None else info["status"]
    if info["status"] == "failed":
        words += f" ({record['run_info']['error_msg'].splitlines()[-1]})"
    where = "validation " if run.phase == "search" else ""
    took = clock(record["run_info"]["total_time"])
    rest = "" if left is None or done == total else f"; about {clock(left)} left"
    return f"[{done}/{total}] {run.label} lr {run.rate:g} seed {run.seed}: {where}{words} in {took}{rest}"
