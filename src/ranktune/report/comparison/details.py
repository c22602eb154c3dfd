"""What a run's directory tells beyond its scores: ranks over time, importance, DyLoRA's curve, MoR's experts."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ranktune.report.rank_history import RankHistory, budget_steps, rank_history
from ranktune.run.directory import RunDirectory


@dataclass(frozen=True)
class MethodDetails:
    """Of one run, that of `seed`; what its directory does not hold is empty.

    Attributes:
        history: ranks of every module over time, None where it has no ranks.
        budget: (step, components allowed) where that changed.
        kept, dropped: importance of components, or of modules, at the end.
        curve: rows of DyLoRA's rank_curve.csv. experts: module to the mean gate of each of MoR's experts.
    """

    seed: int
    history: RankHistory | None = None
    budget: list[tuple[int, int]] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    experts: dict[str, list[float]] = field(default_factory=dict)


def read_details(folder: Path, seed: int) -> MethodDetails:
    """Read what is there. A run directory that was deleted, or made on another machine, leaves everything empty."""
    directory = RunDirectory(folder)
    if not directory.ranks.exists() or not directory.log.exists():
        return MethodDetails(seed)
    ranks, events = directory.read_ranks(), directory.read_events()
    last = max((event.get("step", 0) for event in events), default=0)
    importance = ranks.get("importance") or {}
    return MethodDetails(
        seed=seed,
        history=_thinned(rank_history(ranks["final"], ranks["history"], last)) if ranks["final"] else None,
        budget=budget_steps(ranks, events),
        kept=[score for module in importance.values() for score in module["kept"]],
        dropped=[score for module in importance.values() for score in module["dropped"]],
        curve=_curve(directory.rank_curve),
        experts=_experts(events),
    )


# More stops of the slider than this make the page large and help nobody.
_MOMENTS = 40


def _thinned(history: RankHistory) -> RankHistory:
    if len(history.steps) <= _MOMENTS:
        return history
    places = np.unique(np.linspace(0, len(history.steps) - 1, _MOMENTS).round().astype(int))
    return RankHistory(history.modules, [history.steps[place] for place in places], history.ranks[:, places])


def _curve(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _experts(events: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The last note of the routers in the log."""
    routers = [event for event in events if event["event"] == "routers"]
    return {module: use["load"] for module, use in routers[-1]["modules"].items()} if routers else {}
