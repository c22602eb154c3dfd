"""A sweep as tables, for the terminal and for the page of results: a row per variant, a column per value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepcost.variants import VARIANTS


@dataclass(frozen=True)
class Panel:
    """What of a sweep's record is one table and one set of axes: figures of a part, under a key, times a factor."""

    part: str
    key: str
    title: str
    unit: str
    factor: float = 1.0


PANELS = (
    Panel("time", "step_to_reference", "Time of a training step", "ratio to PEFT LoRA"),
    Panel("memory", "to_reference", "Memory besides the frozen weights", "ratio to PEFT LoRA"),
    Panel("hooks", "controller", "A controller's time in a step, without scoring in backward", "milliseconds", 1e3),
)


def told(record: dict[str, Any]) -> list[Panel]:
    """The parts of a sweep that were measured."""
    return [panel for panel in PANELS if panel.part in record]


def table(record: dict[str, Any], panel: Panel, *, quartiles: bool) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one part of a sweep."""
    figures = {
        (row["variant"], row["value"]): _cell(row[panel.key], panel.factor, quartiles)
        for row in record[panel.part]["rows"]
    }
    names = [name for name in VARIANTS if any(name == variant for variant, _ in figures)]
    head = [record["label"], *(f"{value:,}" for value in record["values"])]
    return head, [[VARIANTS[name].label, *(figures[name, value] for value in record["values"])] for name in names]


def _cell(figure: float | dict[str, float], factor: float, quartiles: bool) -> str:
    """An exact figure alone; a measured one with its quartiles if these are wanted."""
    if not isinstance(figure, dict):
        return _number(figure * factor)
    median, low, high = (_number(figure[name] * factor) for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})" if quartiles and low != high else median


def _number(value: float) -> str:
    """Three digits or a little less: 0.54, 1.00, 12.3, 146."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
