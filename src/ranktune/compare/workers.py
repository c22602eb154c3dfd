"""Processes of this machine that train runs, each one run: a crash costs one and not the grid, and what memory and time
a run takes does not depend on the runs before it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import torch

from ranktune.compare.grid import Run
from ranktune.compare.store import Store
from ranktune.run.startup import silence_chatty_libraries

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
    """Up to `count` processes at a time; `with` ends them whatever happens inside."""

    def __init__(self, store: Store, count: int) -> None:
        context = _context()
        self._workers = [_Worker(store, context) for _ in range(count)]

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
        """Train a run in a process of its own."""
        next(worker for worker in self._workers if worker.run is None).start(run)

    def news(self, seconds: float) -> Iterator[News]:
        """What has happened, waiting up to `seconds` for something to."""
        busy = {worker.connection: worker for worker in self._workers if worker.run is not None}
        for connection in wait(list(busy), seconds):
            worker = busy[connection]  # pyright: ignore[reportArgumentType]
            yield worker.message()


class _Worker:
    """Room for one process."""

    def __init__(self, store: Store, context: BaseContext) -> None:
        self._store, self._context = store, context
        self._process: BaseProcess | None = None
        self.connection: Connection
        self.run: Run | None = None

    def start(self, run: Run) -> None:
        self.run = run
        self.connection, there = self._context.Pipe(duplex=False)
        # Not a daemon, which could have no processes that load data.
        process = self._context.Process(target=_train, args=(there, self._store, run))  # pyright: ignore
        process.start()
        self._process = process
        there.close()  # so that the end of the process is the end of the pipe

    def message(self) -> News:
        run = self.run
        assert run is not None  # only busy workers are asked
        try:
            kind, *values = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._died(run)
        if kind == "progress":
            return Progress(run, *values)
        self._end()
        return Ended(run, *values)

    def _died(self, run: Run) -> Died:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self._end()
        log = self._store.log(run)
        said = log.read_text(errors="replace").strip()[-4000:] if log.exists() else ""
        if code < 0:
            said = f"{said}\nthe process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return Died(run, said.strip() or f"the process ended with exit code {code}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._end()

    def _end(self) -> None:
        """See to it that the process is gone."""
        assert self._process is not None
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()
        self._process, self.run = None, None


def _context() -> BaseContext:
    """How processes are made: on Linux forked off one that has imported the libraries, which alone takes seconds.

    Where there is an accelerator, whose driver survives no fork, and on other systems each is spawned.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranktune.compare.preload"])
    return context


def _train(connection: Connection, store: Store, run: Run) -> None:
    """Train a run and say how it goes; an error ends the process and is in the run's log."""
    # Ctrl-C reaches every process of the terminal: the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _errors_to(store, run)
    silence_chatty_libraries()
    from ranktune.compare.execution import execute

    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        trained = execute(run, store, lambda step, total: connection.send(("progress", step, total)))
        connection.send(("ended", trained))


def _errors_to(store: Store, run: Run) -> None:
    """Send standard error, libraries' own included, to the run's log."""
    sys.stderr.flush()
    with store.log(run).open("wb") as log:
        os.dup2(log.fileno(), 2)
