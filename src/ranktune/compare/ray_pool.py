"""The same runs on a Ray cluster: `pip install ranktune[ray]`, `ray start --head`, `ranktune compare ... --ray`.

Ray places the work; a run whose machine is lost is recorded as failed, and `--retry-failed` trains it again. The
record of a run is written by the machine that trained it, so `--out`, the model and the data must be at the same place
on every machine (a shared file system).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ranktune.compare.execution import execute
from ranktune.compare.grid import Run
from ranktune.compare.store import Store
from ranktune.compare.workers import Died, Ended, News
from ranktune.errors import RecipeError


def load_ray() -> Any:
    """The `ray` module.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RecipeError(
            "--ray needs Ray, which is not installed: pip install 'ranktune[ray]'. One machine needs no Ray: "
            "leave --ray out, and use --jobs for several runs at a time."
        ) from error
    return ray


class RayPool:
    """As many runs at a time as the cluster has room for; each takes one GPU where there are any, else one CPU."""

    def __init__(self, store: Store, ray: Any) -> None:
        self._ray, self._store = ray, store
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        room = ray.cluster_resources()
        kind, self._room = ("num_gpus", room["GPU"]) if room.get("GPU") else ("num_cpus", room.get("CPU", 1))
        # A process for each run, so that the memory of one does not hold what another has left.
        self._train = ray.remote(**{kind: 1, "max_retries": 0, "max_calls": 1})(_train)
        self._pending: dict[Any, Run] = {}

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._pending:
            self._ray.cancel(reference, force=True)

    @property
    def running(self) -> list[Run]:
        """The runs given to the cluster."""
        return list(self._pending.values())

    @property
    def free(self) -> int:
        """How many more it has room for."""
        return max(0, int(self._room) - len(self._pending))

    def start(self, run: Run) -> None:
        """Give a run to the cluster."""
        self._pending[self._train.remote(run, self._store)] = run

    def news(self, seconds: float) -> Iterator[News]:
        """The runs that have ended, waiting up to `seconds` for one."""
        if not self._pending:
            return
        done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        for reference in done:
            run = self._pending.pop(reference)
            try:
                yield Ended(run, self._ray.get(reference))
            except self._ray.exceptions.RayError as error:  # what training raised comes wrapped in one of these
                yield Died(run, str(error))


def _train(run: Run, store: Store) -> bool:
    return execute(run, store, lambda *_: None)
