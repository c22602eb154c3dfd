"""The output directory of a run: the names of its files, when it may be written, and reading it back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranktune.adapter_file import CONFIG_FILE
from ranktune.errors import RecipeError


def unwritable(path: Path) -> Path | None:
    """What keeps one from writing in the folder `path`: it, or the nearest place above it; None where nothing does."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else nearest


@dataclass(frozen=True)
class RunDirectory:
    """`OUT` of the documentation. `metrics.json` is written last, so a run without it did not end."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The pictures of every run."""
        return tuple(self.path / name for name in ("loss.png", "metric.png", "ranks.png"))

    @property
    def movement_pictures(self) -> tuple[Path, ...]:
        """The further pictures of a run whose ranks moved."""
        return tuple(self.path / name for name in ("budget.png", "rank_history.png", "importance.png"))

    @property
    def drawn_picture(self) -> Path:
        """The further picture of a run that drew its ranks."""
        return self.path / "ranks_drawn.png"

    @property
    def router_pictures(self) -> tuple[Path, ...]:
        """The further pictures of a run with routers."""
        return tuple(self.path / name for name in ("experts.png", "router_entropy.png"))

    @property
    def rank_curve(self) -> Path:
        return self.path / "rank_curve.csv"

    @property
    def rank_curve_picture(self) -> Path:
        return self.path / "rank_curve.png"

    def contents(self) -> list[Path]:
        """What a run has left here, finished or not; `metrics.json` first, so that removal begins with it."""
        names = (self.metrics, self.adapter, self.ranks, self.log, self.recipe, self.checkpoints, *self.pictures)
        names = (
            *names,
            *self.movement_pictures,
            *self.router_pictures,
            self.drawn_picture,
            self.rank_curve,
            self.rank_curve_picture,
        )
        return [name for name in names if name.exists()]

    def refuse_unless_writable(self, overwrite: bool) -> None:
        """Check that a run may be written here, changing nothing.

        Raises:
            RecipeError: the path is a file, cannot be written, or already holds a run and `overwrite` is false.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"output: {self.path} is a file; name a folder.")
        if (nearest := unwritable(self.path)) is not None:
            raise RecipeError(f"output: {self.path} cannot be made: {nearest} is not a folder you may write in.")
        if not overwrite and (found := self.contents()):
            raise RecipeError(
                f"output: {self.path} already holds a run ({found[0].name}). Choose another place with output=..., "
                "go on with that run with --resume, or replace it with --overwrite."
            )

    def start(self) -> None:
        """Remove what an earlier run left here; other files stay."""
        for item in [*self.contents(), *self._half_written()]:
            _remove(item)

    def reopen(self) -> None:
        """Make an unfinished run of it again: remove its end, and what a killed process had half written."""
        for item in [self.metrics, self.adapter, self.ranks, *self._half_written()]:
            if item.exists():
                _remove(item)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory, and keep other processes from training in it, where the system can (POSIX).

        Raises:
            RecipeError: another process does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if os.name != "posix":
            yield
            return
        import fcntl

        handle = os.open(self.path, os.O_RDONLY)
        try:
            # The system lets go of it when the process ends, however it ends.
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(f"output: another process is training in {self.path}.") from error
            yield
        finally:
            os.close(handle)

    def _half_written(self) -> list[Path]:
        """What `atomic` had begun to write beside its place when the process was killed."""
        whole = (self.metrics, self.adapter, self.ranks, self.recipe)
        return [item for path in whole for item in self.path.glob(f".{path.name}.*.tmp")]

    def required_recipe(self) -> Path:
        """The recipe of the run that is here, finished or not.

        Raises:
            RecipeError: there is none.
        """
        if not self.path.is_dir():
            raise RecipeError(f"there is no directory {self.path}; give the `output` of a `ranktune train`.")
        if not self.recipe.exists():
            raise RecipeError(f"{self.path} holds no run to go on with: it has no {self.recipe.name}.")
        return self.recipe

    def read_metrics(self) -> dict[str, Any]:
        """The finished run's `metrics.json`.

        Raises:
            RecipeError: there is no finished run here.
        """
        return self._read_json(self.metrics)

    def read_ranks(self) -> dict[str, Any]:
        """The finished run's `ranks.json`."""
        return self._read_json(self.ranks)

    def read_events(self) -> list[dict[str, Any]]:
        """The events of `log.jsonl`; a last line torn by a crash is left out."""
        self._require(self.log)
        events = []
        lines = self.log.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise RecipeError(f"{self.log}, line {number} is not JSON: {error}.") from error
        return events

    def _read_json(self, path: Path) -> dict[str, Any]:
        self._require(path)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not JSON: {error}. Was it edited by hand?") from error

    def _require(self, path: Path) -> None:
        if path.exists():
            return
        if not self.path.is_dir():
            raise RecipeError(f"there is no directory {self.path}; give the `output` of a finished `ranktune train`.")
        if self.contents():
            raise RecipeError(
                f"the run in {self.path} did not finish: it has no {path.name}. Go on with it: ranktune train --resume "
                f"{self.path}"
            )
        if (self.path / CONFIG_FILE).exists():
            raise RecipeError(
                f"{self.path} is the folder of an adapter, and no run: to score it on a run's data, ranktune evaluate "
                f"RUN --adapter {self.path}"
            )
        raise RecipeError(f"{self.path} holds no run: it has no {path.name}.")


def _remove(item: Path) -> None:
    if item.is_dir():
        shutil.rmtree(item)
    else:
        item.unlink()


def folder_beside(trained: Path, ending: str) -> Path:
    """Where something made of a run or of an adapter goes unless another folder is named: NAME-ending beside it."""
    whole = trained.resolve() if trained.name in ("", "..") else trained
    return whole.with_name(f"{whole.name}-{ending}")
