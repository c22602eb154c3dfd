"""Run under torchrun by test_ddp.py: a balanced mor adapter on different data in two processes; prints what it ends as.

With the argument "shared", one router serves the three modules, which then are those of a block.
`train_alone` is the same training in one process, with the two processes' data as micro-batches.
"""

from __future__ import annotations

import json
import os
import sys

import peft
import torch
from accelerate import Accelerator
from torch import nn

from ranktune import MorConfig
from tests.methods import TARGETS, build_base, inputs, perturb

STEPS = 4


def build(shared: bool) -> nn.Module:
    """An adapter whose balancing term is as large as the loss."""
    fields = {"r": 2, "num_experts": 3, "balance_weight": 1.0, "lora_dropout": 0.0, "shared_router": shared}
    base = nn.Sequential(build_base("Linear")) if shared else build_base("Linear")
    model = peft.get_peft_model(base, MorConfig(router="balanced", target_modules=TARGETS, **fields))
    return perturb(model).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Plain gradient descent, so that a wrong factor shows."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def loss_of(model: nn.Module, process: int, step: int) -> torch.Tensor:
    """The loss on the data of one process at one step."""
    return (model(inputs(seed=1000 * process + step)) - 1.0).square().mean()


def adapter_of(model: nn.Module) -> dict[str, list[float]]:
    """The adapter's numbers by name."""
    return {name: value.flatten().tolist() for name, value in model.state_dict().items() if "ranktune_" in name}


def train_alone(shared: bool) -> dict[str, list[float]]:
    """The same in one process."""
    model = build(shared)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for process in (0, 1):
            (loss_of(model, process, step) / 2).backward()
        optimizer.step()
    return adapter_of(model)


def main() -> None:
    """Train through accelerate's DDP."""
    accelerator = Accelerator(cpu=True)
    model = build(shared="shared" in sys.argv)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, accelerator.process_index, step))
        optimizer.step()
    result = {"rank": accelerator.process_index, "adapter": adapter_of(accelerator.unwrap_model(model))}
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")
    sys.stdout.flush()
    accelerator.wait_for_everyone()
    # Without tearing the interpreter down: gloo's threads may outlive the other process and abort at exit.
    os._exit(0)


if __name__ == "__main__":
    main()
