"""The runs of a comparison: searches for each method's learning rate, then the runs that are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ranktune.compare.budget import Share
from ranktune.compare.methods import Variant
from ranktune.compare.search import Trial, best_point, learning_rate, points_to_try
from ranktune.recipe import Recipe

Phase = Literal["search", "final"]


@dataclass(frozen=True)
class Run:
    """One training run: whose, for what, and the complete recipe. `budget` is None where there is none to keep."""

    label: str
    phase: Phase
    rate: float
    seed: int
    id: str
    recipe: Recipe
    budget: int | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the result: the recipe without its place."""
        values = {key: value for key, value in self.recipe.resolved().items() if key != "output"}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Grid:
    """Everything that decides which runs there are.

    Attributes:
        recipe: the recipe that all runs share.
        shares: every method with its part of the parameter budget, in the order of the report.
        seeds: those of the final runs. search_seeds: those of the search; none means no search.
        validation: share of the training examples that the search scores on.
        budget: adapter parameters that every method is to end with.
        runs: the folder of all runs.
    """

    recipe: Recipe
    shares: tuple[tuple[Variant, Share], ...]
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    validation: float
    budget: int
    runs: Path

    def wanted(self, records: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """Every run that is known to be needed, given the records so far; with all of them recorded, all there are.

        A method's final runs follow when its search has ended; of a method without any usable learning rate there are
        none.
        """
        searches, finals, _ = self._runs(records)
        return [*searches, *finals]

    def foreseen(self, records: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """`wanted`, and the final runs of methods whose search has not ended, at the centre's rate for want of theirs.

        It tells how many runs there will be at least, not which.
        """
        searches, finals, to_follow = self._runs(records)
        return [*searches, *finals, *to_follow]

    def _runs(self, records: Mapping[str, Mapping[str, Any]]) -> tuple[list[Run], list[Run], list[Run]]:
        """The search's runs, the final runs, and stand-ins for those that will follow a search that has not ended."""
        searches, finals, to_follow = [], [], []
        for variant, share in self.shares:
            tried = self._tried(variant, share, records)
            points = points_to_try(tried) if self.search_seeds else [0]
            if self.search_seeds:
                searches += [self._run(variant, share, "search", p, seed) for p in points for seed in self.search_seeds]
            if not self.search_seeds:
                chosen = 0
            elif all(point in tried for point in points):
                chosen = best_point(tried)
            else:
                to_follow += [self._run(variant, share, "final", 0, seed) for seed in self.seeds]
                continue
            if chosen is not None:
                finals += [self._run(variant, share, "final", chosen, seed) for seed in self.seeds]
        return searches, finals, to_follow

    def trials(self, variant: Variant, records: Mapping[str, Mapping[str, Any]]) -> dict[float, Trial]:
        """Learning rate to what it achieved in the search."""
        share = next(share for other, share in self.shares if other == variant)
        tried = self._tried(variant, share, records)
        return {self._rate(variant, point): trial for point, trial in sorted(tried.items())}

    def _tried(self, variant: Variant, share: Share, records: Mapping[str, Mapping[str, Any]]) -> dict[int, Trial]:
        tried: dict[int, Trial] = {}
        while self.search_seeds:
            missing = [point for point in points_to_try(tried) if point not in tried]
            found = {point: self._trial(variant, share, point, records) for point in missing}
            tried |= {point: trial for point, trial in found.items() if trial is not None}
            if not missing or None in found.values():
                break
        return tried

    def _trial(
        self, variant: Variant, share: Share, point: int, records: Mapping[str, Mapping[str, Any]]
    ) -> Trial | None:
        """The mean over the search's seeds, or None while one of them is missing; one failure spoils the rate."""
        runs = [self._run(variant, share, "search", point, seed) for seed in self.search_seeds]
        if any(run.id not in records for run in runs):
            return None
        own = [records[run.id]["comparison"] for run in runs]
        if any(record["score"] is None for record in own):
            return Trial(None, None)
        sign = 1.0 if own[0]["greater_is_better"] else -1.0
        losses = [record["loss"] for record in own if record["loss"] is not None]
        return Trial(
            sign * sum(record["score"] for record in own) / len(own), sum(losses) / len(losses) if losses else None
        )

    def _rate(self, variant: Variant, point: int) -> float:
        return learning_rate(self.recipe.train.learning_rate * variant.learning_rate_factor, point)

    def _run(self, variant: Variant, share: Share, phase: Phase, point: int, seed: int) -> Run:
        rate = self._rate(variant, point)
        name = f"{variant.slug}-{phase}-lr{rate:g}-seed{seed}"
        # Nothing between the start and the end of a search is looked at, and nothing of a run is resumed.
        changes: dict[str, Any] = {"learning_rate": rate, "seed": seed, "save_every": "never"}
        changes |= {"eval_every": "never"} if phase == "search" else {}
        held_out = {"validation_fraction": self.validation if phase == "search" else None}
        recipe = self.recipe.model_copy(
            update={
                "method": share.method,
                "train": self.recipe.train.model_copy(update=changes),
                "data": self.recipe.data.model_copy(update=held_out),
                "output": str(self.runs / name),
            }
        )
        return Run(variant.label, phase, rate, seed, name, recipe, share.budget)
