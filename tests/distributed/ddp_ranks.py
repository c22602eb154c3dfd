"""Run under torchrun by test_ddp.py: two processes, different data, one bad gradient; prints what each ends with.

The argument names the method.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import peft
import torch
from accelerate import Accelerator

import ranktune
from ranktune import DyLoraConfig, DynamicDoraConfig, IncreLoraConfig, RankController
from ranktune.adapters import updates
from ranktune.nested import NestedUpdate
from tests.methods import TARGETS, build_base, inputs

STEPS = 30
CONFIGS = {
    "dynamic-dora": DynamicDoraConfig(r=4, target_modules=TARGETS, prune_interval=2, dem_weight=0.2),
    "increlora": IncreLoraConfig(r=4, target_modules=TARGETS, grow_interval=3, top_h=1, grow_by=2),
    "dylora": DyLoraConfig(r=4, target_modules=TARGETS),
}


def main() -> None:
    """Train an adapter whose ranks move, through accelerate's DDP."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(rank)  # DDP broadcasts the first process's weights
    model = peft.get_peft_model(build_base("Linear"), CONFIGS[sys.argv[1]])
    optimizer = torch.optim.AdamW(ranktune.parameter_groups(model, 0.02, 0.01), lr=0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    controller = RankController(model, optimizer, STEPS)
    nested = [update for _, update in updates(model) if isinstance(update, NestedUpdate)]
    drawn = []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        accelerator.backward((model(inputs(seed=1000 * rank + step)) - 1.0).square().mean())
        if step == 10 and rank == 1:
            # After the reduction, in one process only: both have to skip.
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        drawn += [update.draw.span for update in nested]
        optimizer.step()
    adapter = accelerator.unwrap_model(model)
    digest = hashlib.sha256()
    for name, value in sorted(adapter.state_dict().items()):
        if "ranktune_" in name:
            digest.update(value.numpy().tobytes())
    result = {"rank": rank, "skipped": controller.skipped, "step": controller.step, "ranks": controller.ranks()}
    sys.stdout.write("RESULT " + json.dumps({**result, "drawn": drawn, "digest": digest.hexdigest()}) + "\n")
    sys.stdout.flush()
    accelerator.wait_for_everyone()
    # Without tearing the interpreter down: gloo's threads may outlive the other process and abort at exit.
    os._exit(0)


if __name__ == "__main__":
    main()
