"""`SavingCallback`: every checkpoint is a clean cut through a run, so that what follows does not depend on the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from ranktune.run.manifest import write_manifest


class SavingCallback(TrainerCallback):
    """Has everything up to a checkpoint logged and scored before it is written.

    A logged loss is the mean since the last log, which Trainer forgets at a checkpoint; and the scores at the end of an
    epoch are not made up for by a run that resumes from its last step. What was written gets a manifest.
    """

    def __init__(self) -> None:
        self._postponed = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Log, score and save as often as is said now, not as the checkpoint remembers."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Log before saving; at the end of an epoch that will be scored, save after that."""
        scored_next = args.eval_strategy == IntervalStrategy.EPOCH
        if control.should_save and scored_next and (float(state.epoch).is_integer() or control.should_training_stop):
            control.should_save, self._postponed = False, True
        if control.should_save or self._postponed:
            control.should_log = True

    def on_epoch_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Save what was postponed."""
        control.should_save = control.should_save or self._postponed
        control.should_log = control.should_log or control.should_save
        self._postponed = False

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """List what Trainer has written, once every process has written its part."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            write_manifest(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
