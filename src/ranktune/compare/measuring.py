"""What a run costs while it trains: memory at every optimizer step, tokens and time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CostCallback(TrainerCallback):
    """Samples memory after every step, and counts the tokens that the trainer has seen.

    Attributes:
        kind: "cuda", what the caching allocator has reserved; or "process", the resident memory of the process, which
            holds the libraries too.
    """

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "process"
        self._samples: list[int] = []
        self._process = psutil.Process()
        self._began = 0.0
        self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Start the clock, and the allocator's own peak."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Take a sample."""
        self._samples.append(torch.cuda.memory_reserved() if self.kind == "cuda" else self._process.memory_info().rss)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._began
        self.tokens = int(state.num_input_tokens_seen)

    def memory(self) -> dict[str, int]:
        """Bytes, in the words of PEFT's method comparison."""
        samples = self._samples or [0]
        peak = torch.cuda.max_memory_reserved() if self.kind == "cuda" else max(samples)
        return {
            "accelerator_memory_reserved_avg": int(np.mean(samples)),
            "accelerator_memory_max": int(peak),
            "accelerator_memory_reserved_99th": int(np.percentile(samples, 99)),
        }
