"""Peak memory of a run: what CUDA allocated where there is a GPU, else the process's resident memory."""

from __future__ import annotations

import resource
import sys

import torch


class PeakMemory:
    """Starts counting when made; `kind` says what is counted."""

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "process"
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def megabytes(self) -> float:
        """The peak so far, in MiB. The process's peak counts from its start and cannot be reset."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
