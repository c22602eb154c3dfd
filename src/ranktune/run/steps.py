"""How many optimizer steps a run will have: Trainer's own arithmetic, done before there is a Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass(frozen=True)
class ExpectedSteps:
    """The length of a run, and how it comes about.

    Attributes:
        total: optimizer steps. epochs: passes over the data, begun ones counted.
        arithmetic: what the steps are made of, for messages.
    """

    total: int
    epochs: int
    arithmetic: str

    @classmethod
    def of(cls, args: TrainingArguments, examples: int) -> ExpectedSteps:
        """Count them for so many training examples; a text that is cut into blocks has as many as it has blocks."""
        round_off = math.floor if args.dataloader_drop_last else math.ceil
        batches = round_off(round_off(examples / args.train_batch_size) / args.world_size)
        per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        if args.max_steps > 0:
            return cls(args.max_steps, math.ceil(args.max_steps / per_epoch), f"train.max_steps={args.max_steps}")
        total = math.ceil(args.num_train_epochs * per_epoch)
        factors = [f"{examples:,} examples in batches of {args.train_batch_size}"]
        factors += [f"on {args.world_size} processes"] if args.world_size > 1 else []
        if args.gradient_accumulation_steps > 1:
            factors.append(f"{args.gradient_accumulation_steps} batches a step")
        epochs = f"{args.num_train_epochs:g} epochs" if args.num_train_epochs != 1 else "1 epoch"
        return cls(
            total, math.ceil(args.num_train_epochs), f"{', '.join(factors)}: {per_epoch:,} steps an epoch, {epochs}"
        )
