"""What a finished run leaves: the adapter, its ranks, the pictures and, last, `metrics.json`."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

import ranktune
from ranktune.baselines import reading
from ranktune.report.model_card import model_card
from ranktune.report.plots import draw_run
from ranktune.run import atomic
from ranktune.run.directory import RunDirectory
from ranktune.run.events import EventCallback
from ranktune.run.memory import PeakMemory
from ranktune.run.prepare import Prepared

_VERSIONED = ("torch", "transformers", "peft", "accelerate", "datasets")


def save_result(
    directory: RunDirectory,
    prepared: Prepared,
    trainer: Trainer,
    events: EventCallback,
    after: dict[str, float],
    movement: dict[str, Any],
    training_params: int,
    memory: PeakMemory,
) -> dict[str, Any]:
    """Write the result of a run, each file whole or not at all.

    Args:
        trainer: it holds the model.
        events: it knows the scores before, and the time.
        after: the scores of the model as it is.
        movement: what `ranks.json` tells about ranks that moved.
        training_params: what the optimizer moved, before anything was dropped.
        memory: counted since the process began to train; earlier parts of a resumed run are not in it.

    Returns:
        The content of `metrics.json`.
    """
    model: Any = trainer.model
    metric, ranks = prepared.task.metric, reading.ranks(model)
    card = model_card(
        {
            "method": prepared.recipe.method["name"],
            "model": prepared.source.name,
            "task": prepared.task.name,
            "num_labels": len(prepared.data.labels or ()),
            "metric": metric,
            "before": events.before[metric],
            "after": after[metric],
            "steps": trainer.state.global_step,
            "seed": prepared.recipe.train.seed,
            "trainable_params": reading.final_parameters(model),
            "versions": {"ranktune": ranktune.__version__},
        },
        ranks,
        prepared.recipe.method,
    )

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))
        # PEFT's own is a form to fill in, with the base model's place on this machine in it.
        (folder / "README.md").write_text(card, encoding="utf-8")

    atomic.write_folder(directory.adapter, save)
    atomic.write_json(directory.ranks, {"final": ranks, **movement})
    draw_run(directory)
    metrics = {
        "method": prepared.recipe.method["name"],
        "task": prepared.task.name,
        "metric": metric,
        "greater_is_better": prepared.task.greater_is_better,
        "before": events.before[metric],
        "after": after[metric],
        **_sizes(model),
        "training_params": training_params,
        "steps": trainer.state.global_step,
        "seconds": events.seconds(),
        "samples_per_second": _examples_seen(trainer) / events.seconds(),
        "resumed_at": [event["step"] for event in directory.read_events() if event["event"] == "resume"],
        "peak_memory_mb": memory.megabytes(),
        "peak_memory_kind": memory.kind,
        "adapter_bytes": sum(file.stat().st_size for file in directory.adapter.glob("*.safetensors")),
        "seed": prepared.recipe.train.seed,
        # In the order of their names, which a checkpoint also gives them.
        "scores": {"before": dict(sorted(events.before.items())), "after": dict(sorted(after.items()))},
        "model": prepared.source.name,
        "data": {"description": prepared.data.description, "fingerprint": prepared.data.fingerprint},
        "versions": {
            "python": platform.python_version(),
            "ranktune": ranktune.__version__,
            **{package: version(package) for package in _VERSIONED},
        },
    }
    atomic.write_json(directory.metrics, metrics)
    return atomic.finite(metrics)


def _examples_seen(trainer: Trainer) -> int:
    args = trainer.args
    return trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _numbers(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: of four bits, two fit into one number of its storage."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _sizes(model: nn.Module) -> dict[str, int]:
    """Parameter counts and the total rank. `total_params` is the model with its adapter."""
    return {
        "trainable_params": reading.final_parameters(model),
        "active_params": reading.active_parameters(model),
        "total_params": sum(_numbers(parameter) for parameter in model.parameters()),
        "total_rank": sum(reading.ranks(model).values()),
    }
