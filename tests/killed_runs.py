"""Runs of the command line that are killed (SIGKILL, by themselves) at chosen moments, and resumed.

    python -m tests.killed_runs FOLDER METHOD

Everything is imported once; each run is a fork of this process, so that dozens of them take seconds. Before a run
begins, its own copy of a library function is replaced by one that kills it: nothing in the product knows of this. Every
run leaves its output directory in FOLDER; how each process ended goes to `ended.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerState, trainer_utils

import ranktune.training  # noqa: F401  (so that forks need not import it)
from ranktune.cli import main
from ranktune.run import atomic, result
from tests.tiny import WIDTH, write_everything, write_model

Sabotage = Callable[[], None]

# 96 examples, 16 a step in two micro-batches: 6 steps an epoch, 24 in all.
SHARED = [
    "train.epochs=4", "train.batch_size=8", "train.gradient_accumulation=2", "train.logging_steps=1",
    "train.save_every=2", "train.eval_every=8",
]  # fmt: skip
METHODS = {
    # Pruning begins after step 4, at 6, 8 and 10, and is final at 12.
    "dynamic-dora": "method={name: dynamic-dora, r: 2, prune_interval: 2, lora_dropout: 0.1}",
    # Rounds in the steps after the 6th, the 9th and the 12th, each with a ramp of 3 steps.
    "increlora": "method={name: increlora, r: 3, grow_by: 1, grow_interval: 3, lora_dropout: 0.1, use_dora: true}",
    "dylora": "method={name: dylora, r: 4, lora_dropout: 0.1}",
    "dora": "method={name: dora, r: 2, lora_dropout: 0.1}",
    "nf4": "method={name: dynamic-dora, r: 2, prune_interval: 2, lora_dropout: 0.1, use_dora: true}",
}
# Numbers of a base weight that share a scale in 4 bits: the tiny model is made so wide.
WIDTHS = {"nf4": 64}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(number: int) -> None:
    """Between the two micro-batches of the optimizer step that has so many before it."""
    original = Trainer.training_step
    seen = []

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.state.global_step)
        if seen.count(number) == 2:
            die()
        return original(self, *args, **kwargs)

    Trainer.training_step = training_step


def while_writing(name: str, step: int) -> None:
    """In the middle of one file of a checkpoint."""
    folder = f"checkpoint-{step}"

    def torn(path: Path) -> None:
        if path.name == name and path.parent.name == folder:
            os.truncate(path, path.stat().st_size // 2)
            die()

    save, save_state, save_adapter = torch.save, TrainerState.save_to_json, PeftModel.save_pretrained

    def torch_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        torn(Path(path))

    def state_to_json(self: TrainerState, path: str) -> None:
        save_state(self, path)
        torn(Path(path))

    def adapter_to_files(self: PeftModel, path: str, *args: Any, **kwargs: Any) -> None:
        save_adapter(self, path, *args, **kwargs)
        torn(Path(path) / "adapter_model.safetensors")

    torch.save, TrainerState.save_to_json, PeftModel.save_pretrained = torch_save, state_to_json, adapter_to_files


def while_removing(step: int) -> None:
    """In the middle of removing an old checkpoint."""

    def rmtree(path: str, **_: Any) -> None:
        if path.endswith(f"checkpoint-{step}"):
            (Path(path) / "optimizer.pt").unlink()
            die()
        shutil.rmtree(path)

    trainer_utils.shutil = type("Shutil", (), {"rmtree": staticmethod(rmtree)})


def in_the_end(place: str) -> None:
    """When training is over: while the adapter is written, before the pictures, or before `metrics.json`."""
    if place == "pictures":
        result.draw_run = lambda _: die()
    elif place == "adapter":
        write_folder = atomic.write_folder

        def half(path: Path, fill: Callable[[Path], None]) -> None:
            write_folder(path, lambda folder: (fill(folder), die()))

        atomic.write_folder = half
    else:
        write_json = atomic.write_json
        atomic.write_json = lambda path, value: die() if path.name == place else write_json(path, value)


# Of every case, what kills the first process, the one that resumes it, and so on; the last one is left alone.
CASES: dict[str, dict[str, list[Sabotage]]] = {
    "dynamic-dora": {
        "before-the-first-checkpoint": [partial(in_step, 1)],
        "at-a-pruning": [partial(in_step, 6)],
        "at-the-last-pruning": [partial(in_step, 12)],
        "three-times": [partial(in_step, 5), partial(in_step, 9), partial(in_step, 19)],
        "writing-the-adapter": [partial(while_writing, "adapter_model.safetensors", 8)],
        "writing-the-state": [partial(while_writing, "trainer_state.json", 14)],
        "writing-the-result": [partial(in_the_end, "pictures")],
    },
    "increlora": {
        "at-a-round": [partial(in_step, 6)],
        "mid-ramp": [partial(in_step, 9)],
        "at-the-last-round": [partial(in_step, 12)],
        "in-the-final-phase": [partial(in_step, 21)],
    },
    "dylora": {"in-the-middle": [partial(in_step, 9)]},
    "dora": {"in-the-middle": [partial(in_step, 9)], "at-the-end-of-an-epoch": [partial(in_step, 12)]},
    "nf4": {"in-the-middle": [partial(in_step, 9)], "twice": [partial(in_step, 6), partial(in_step, 21)]},
}
# `make test-kills`: these too.
MORE: dict[str, dict[str, list[Sabotage]]] = {
    "dynamic-dora": {
        **{f"in-step-{step}": [partial(in_step, step)] for step in range(2, 24)},
        "writing-the-optimizer": [partial(while_writing, "optimizer.pt", 10)],
        "writing-the-scheduler": [partial(while_writing, "scheduler.pt", 10)],
        "writing-the-random-state": [partial(while_writing, "rng_state.pth", 12)],
        "writing-the-first": [partial(while_writing, "optimizer.pt", 2)],
        "removing-an-old-one": [partial(while_removing, 8)],
        "writing-the-end": [partial(in_the_end, place) for place in ("adapter", "ranks.json", "metrics.json")],
    },
    "increlora": {
        **{f"in-step-{step}": [partial(in_step, step)] for step in range(2, 24)},
        "writing-a-checkpoint": [partial(while_writing, "optimizer.pt", 10)],
        "writing-the-result": [partial(in_the_end, "pictures")],
    },
}
# Also the parts of Trainer that a fixed rank leaves to be tested: order by length, scores at the ends of epochs.
OWN = {
    "dora": ["train.trainer.train_sampling_strategy=group_by_length", "train.eval_every=epoch", "train.save_every=3"],
    "nf4": ["quantization=nf4"],
}


def run(arguments: list[str], log: Path, *sabotage: Sabotage) -> int:
    """Run the command line in a fork; its exit code, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output = log.open("ab")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    code = 1
    try:
        for harm in sabotage:
            harm()
        sys.argv = ["ranktune", *arguments]
        main()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def no_pictures() -> None:
    """They take longer than the training."""
    result.draw_run = lambda _: None


def every_case(folder: Path, method: str) -> dict[str, list[int]]:
    """Run all that there is for a method; how each process ended."""
    recipe = write_everything(folder)
    write_model(folder / "model", WIDTHS.get(method, WIDTH))
    config = folder / "model" / "config.json"
    config.write_text(config.read_text().replace('dropout_prob": 0.0', 'dropout_prob": 0.1'))
    train = ["train", str(recipe), METHODS[method], *SHARED, *OWN.get(method, [])]
    ended = {"whole": [run([*train, f"output={folder / 'whole'}"], folder / "whole.txt", no_pictures)]}
    cases = {**CASES[method], **(MORE.get(method, {}) if os.environ.get("RANKTUNE_ALL_KILLS") else {})}
    for name, kills in cases.items():
        log = folder / f"{name}.txt"
        steps = [[*train, f"output={folder / name}"], *[["train", "--resume", str(folder / name)] for _ in kills]]
        harms = [[no_pictures, kill] for kill in kills] + [[no_pictures]]
        ended[name] = [run(step, log, *harm) for step, harm in zip(steps, harms, strict=True)]
    return ended


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "ended.json").write_text(json.dumps(every_case(place, sys.argv[2])))
