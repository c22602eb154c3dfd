"""Processes of this machine that train runs, each one after another, so that a crash costs one run and not the grid."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ranktune.compare.grid import Run
from ranktune.compare.store import Store

_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """A run has done `step` of `total` steps."""

    run: Run
    step: int
    total: int


@dataclass(frozen=True)
class Ended:
    """A run has its record (`trained`), or belongs to another process."""

    run: Run
    trained: bool


@dataclass(frozen=True)
class Died:
    """The process that trained a run is gone; `reason` is what it left to say."""

    run: Run
    reason: str


News = Progress | Ended | Died


class Workers:
    """`count` processes; `with` ends them whatever happens inside.

    They are spawned, not forked: torch's threads and CUDA survive no fork.
    """

    def __init__(self, store: Store, count: int) -> None:
        self._store = store
        self._workers = [_Worker(store) for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    @property
    def running(self) -> list[Run]:
        """The runs in training."""
        return [worker.run for worker in self._workers if worker.run is not None]

    @property
    def free(self) -> int:
        """How many more runs can be started."""
        return len(self._workers) - len(self.running)

    def start(self, run: Run) -> None:
        """Give a run to a free process."""
        next(worker for worker in self._workers if worker.run is None).start(run)

    def news(self, seconds: float) -> Iterator[News]:
        """What has happened, waiting up to `seconds` for something to."""
        busy = {worker.connection: worker for worker in self._workers if worker.run is not None}
        for connection in wait(list(busy), seconds):
            worker = busy[connection]  # pyright: ignore[reportArgumentType]
            yield worker.message()


class _Worker:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._process: BaseProcess | None = None
        self.connection: Connection
        self.run: Run | None = None

    def start(self, run: Run) -> None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there, self._store), daemon=True)
            self._process.start()
            there.close()  # so that the end of the process is the end of the pipe
        self.run = run
        self.connection.send(run)

    def message(self) -> News:
        run = self.run
        assert run is not None  # only busy workers are asked
        try:
            kind, *values = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._died(run)
        if kind == "progress":
            return Progress(run, *values)
        self.run = None
        return Ended(run, *values)

    def _died(self, run: Run) -> Died:
        assert self._process is not None
        self._process.join()
        code, self._process, self.run = self._process.exitcode or 0, None, None
        log = self._store.log(run)
        said = log.read_text(errors="replace").strip()[-4000:] if log.exists() else ""
        if code < 0:
            said = f"{said}\nthe process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return Died(run, said.strip() or f"the process ended with exit code {code}")

    def stop(self) -> None:
        if self._process is None:
            return
        self.connection.close()  # which an idle process takes for the end
        if self.run is not None:
            self._process.terminate()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None


def _serve(connection: Connection, store: Store) -> None:
    """Train the runs that come through the connection until it closes; an error ends the process and is in its log."""
    # Ctrl-C reaches every process of the terminal: the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ranktune.compare.execution import execute

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            run = connection.recv()
            _errors_to(store, run)
            trained = execute(run, store, lambda step, total: connection.send(("progress", step, total)))
            connection.send(("ended", trained))


def _errors_to(store: Store, run: Run) -> None:
    """Send standard error, libraries' own included, to the run's log."""
    sys.stderr.flush()
    with store.log(run).open("wb") as log:
        os.dup2(log.fileno(), 2)
