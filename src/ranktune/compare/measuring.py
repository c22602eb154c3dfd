"""What a run costs while it trains: memory at every optimizer step, tokens and time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CostCallback(TrainerCallback):
    """Samples memory after every step, and counts the time and the tokens of training.

    Attributes:
        kind: "cuda", what the caching allocator has reserved; or "process", the resident memory of the process, which
            holds the libraries too.
        seconds: from the first step to the last, without the scoring between them.
        tokens: that the trainer has seen.
    """

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "process"
        self._samples: list[int] = []
        self._peak = 0
        self._process = psutil.Process()
        self._began = 0.0
        self._scoring_since: float | None = None
        self._scoring = 0.0
        self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Start the clock and the allocator's own peak, without what scoring before training had it reserve."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Take a sample."""
        self._samples.append(torch.cuda.memory_reserved() if self.kind == "cuda" else self._process.memory_info().rss)
        self._stop_for_scoring(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Stop the clock, where an epoch is followed by its scores."""
        self._stop_for_scoring(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Go on; scores before and after training stopped nothing."""
        if self._scoring_since is not None:
            self._scoring += time.perf_counter() - self._scoring_since
            self._scoring_since = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Stop the clock, and keep the peak: what follows is no training."""
        self.seconds = time.perf_counter() - self._began - self._scoring
        self.tokens = int(state.num_input_tokens_seen)
        self._peak = torch.cuda.max_memory_reserved() if self.kind == "cuda" else max(self._samples, default=0)

    def memory(self) -> dict[str, int]:
        """Bytes, in the words of PEFT's method comparison."""
        samples = self._samples or [0]
        return {
            "accelerator_memory_reserved_avg": int(np.mean(samples)),
            "accelerator_memory_max": int(self._peak),
            "accelerator_memory_reserved_99th": int(np.percentile(samples, 99)),
        }

    def _stop_for_scoring(self, control: TrainerControl) -> None:
        """Scores follow at once: their time is not training's."""
        if control.should_evaluate and self._scoring_since is None:
            if self.kind == "cuda":
                torch.cuda.synchronize()  # else the last steps' work would count as scoring
            self._scoring_since = time.perf_counter()
