"""Where the measurement runs: device, precision, clock, and a description of all of it for the record."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


class Precision(str, Enum):
    """Of weights and activations. In bf16 the base is bfloat16, adapters are what PEFT makes of them (float32), and
    forward runs under autocast: what ``Trainer(bf16=True)`` does with a bfloat16 model."""

    fp32 = "fp32"
    bf16 = "bf16"


class Clock(str, Enum):
    """Wall time, or the processor time of this process. With one thread, the latter does not see what else runs."""

    wall = "wall"
    cpu = "cpu"


@dataclass(frozen=True)
class Machine:
    """Torch device, precision and clock of a run."""

    device: str = "cpu"
    precision: Precision = Precision.fp32
    clock: Clock = Clock.wall

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU, whose work has to be waited for."""
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the input."""
        return torch.bfloat16 if self.precision is Precision.bf16 else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.precision is Precision.fp32:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=self.dtype)

    def now(self) -> float:
        """Seconds on the chosen clock, once the device has finished what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock is Clock.cpu else time.perf_counter()

    def describe(self) -> dict[str, Any]:
        """Everything someone who doubts the figures would ask for, the command of this process among it."""
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": _command(sys.argv),
            "versions": {name: version(name) for name in ("ranktune", "torch", "peft", "transformers")}
            | {"python": platform.python_version()},
            "processor": _processor(),
            "device_name": torch.cuda.get_device_name(self.device) if self.is_cuda else None,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": _load(),
        }


# Options that change no figure: those with a value, and all.
_WITH_VALUE = ("--out", "--note", "--jobs")
_NOT_OF_FIGURES = (*_WITH_VALUE, "--report-only")


def _command(words: Sequence[str]) -> str:
    """What makes the figures again: the script's name and its arguments that change them."""
    kept = [Path(words[0]).name]
    for before, word in pairwise(words):
        if before not in _WITH_VALUE and not word.startswith(_NOT_OF_FIGURES):
            kept.append(shlex.quote(word))
    return " ".join(kept)


def is_busy() -> bool:
    """Whether the processor already has at least one task per core."""
    load = _load()
    return load is not None and load >= (os.cpu_count() or 1)


def _load() -> float | None:
    """Running tasks, on average over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
    """The processor's name as Linux gives it, or what Python knows."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
