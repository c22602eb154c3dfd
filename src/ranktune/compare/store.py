"""The shared folder of a comparison: one JSON per finished run, and locks by which several processes share the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ranktune.compare.grid import Run
from ranktune.compare.record import missing_field, settings
from ranktune.errors import RecipeError
from ranktune.run import atomic

# So often a run may kill the process it runs in before it is given up.
ATTEMPTS = 2


@dataclass(frozen=True)
class Store:
    """`OUT/runs`: `ID.json` is a finished run's record, `ID/` its run directory, `.ID.lock` held while it is trained.

    The lock is the operating system's: it falls with the process that holds it, so that a claim is never stale.
    """

    folder: Path

    def start(self) -> None:
        """Make the folder.

        Raises:
            RecipeError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--out: {self.folder} cannot be made: {error}.") from error

    def records(self) -> dict[str, dict[str, Any]]:
        """Every finished run by its name.

        Raises:
            RecipeError: a record was edited into something that is none.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise RecipeError(f"{path} is not JSON: {error}. Delete it to repeat the run.") from error
            if missing := missing_field(record):
                raise RecipeError(
                    f"{path} is no record of a comparison's run: it has no '{missing}'. Delete it to repeat the run."
                )
            found[path.stem] = record
        return found

    def refuse_others(self, run: Run, record: Mapping[str, Any]) -> None:
        """Check that the record under the run's name is this run's.

        Raises:
            RecipeError: it was made with other settings; the first that differs is named.
        """
        if record["comparison"]["fingerprint"] == run.fingerprint:
            return
        now = {key: value for key, value in run.recipe.resolved().items() if key != "output"}
        then = {"method": now["method"], **settings(record)}
        difference = _first_difference(then, now) or "unknown"
        raise RecipeError(
            f"{self.folder / run.id}.json was trained with other settings ({difference}). Results of different "
            "settings cannot be compared: choose another --out, or delete what is there."
        )

    def write(self, run: Run, record: dict[str, Any]) -> None:
        """Keep a finished run's record; it is finished from now on."""
        atomic.write_json(self.folder / f"{run.id}.json", record)
        self.forgive(run)

    def forget_failures(self) -> int:
        """Delete the records of runs that failed, so that they are tried again; how many there were."""
        failed = [name for name, record in self.records().items() if record["train_info"]["status"] == "failed"]
        for name in failed:
            (self.folder / f"{name}.json").unlink()
        return len(failed)

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether the run is this process's to train, for as long as the block lasts."""
        lock = FileLock(self.folder / f".{run.id}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            # Between the caller's look at the records and the lock another process may have finished it.
            yield not (self.folder / f"{run.id}.json").exists()
        finally:
            lock.release()

    def begin(self, run: Run) -> int:
        """Note that the run is being tried, and tell how often it has been, this time counted."""
        path = self._attempts(run)
        tries = 1 + (int(path.read_text()) if path.exists() else 0)
        atomic.write_text(path, str(tries))
        return tries

    def forgive(self, run: Run) -> None:
        """Forget the run's attempts: it has finished, or was interrupted by the user and not by itself."""
        self._attempts(run).unlink(missing_ok=True)

    def log(self, run: Run) -> Path:
        """Where the run's standard error goes."""
        return self.folder / f"{run.id}.log"

    def tidy(self, run: Run) -> None:
        """Remove what a finished run leaves that nobody will look at: a search's weights, and an empty log."""
        if run.phase == "search":
            shutil.rmtree(Path(run.recipe.output) / "adapter", ignore_errors=True)
        log = self.log(run)
        if log.exists() and not log.stat().st_size:
            log.unlink()

    def _attempts(self, run: Run) -> Path:
        return self.folder / f".{run.id}.attempts"


def _first_difference(then: Any, now: Any, path: str = "") -> str | None:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in then if key not in now)]:
            found = _first_difference(then.get(key), now.get(key), f"{path}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if then == now else f"{path}: {then!r} then, {now!r} now"
