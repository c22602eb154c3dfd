"""`ranktune train` as a function: check everything, load the model, score, train, score again, save."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel
from transformers import Trainer

import ranktune
from ranktune.baselines import Baseline, reading
from ranktune.controller import history_records
from ranktune.integrations.trainer import RankCallback, RankEarlyStoppingCallback
from ranktune.recipe import Recipe, recipe_text
from ranktune.report.plots import draw_run
from ranktune.run import atomic
from ranktune.run.directory import RunDirectory
from ranktune.run.display import Display, DisplayCallback
from ranktune.run.events import EventCallback, EventLog, scores_only
from ranktune.run.memory import PeakMemory
from ranktune.run.model import adapted, pretrained
from ranktune.run.prepare import Examples, Prepared, prepare, prepare_examples
from ranktune.run.session import build_trainer, libraries_quiet
from ranktune.run.targets import Plan

_VERSIONED = ("torch", "transformers", "peft", "accelerate", "datasets")


def train(recipe: Recipe, file: str | Path, display: Display, *, overwrite: bool = False) -> dict[str, Any]:
    """Train what the recipe says and leave the result in its output directory.

    Args:
        recipe: as `load_recipe` returns it.
        file: the recipe's file, for messages.
        display: where progress is shown.
        overwrite: replace a run that is already in the output directory, once the new one is ready to start.

    Returns:
        The content of `metrics.json`.

    Raises:
        RecipeError, DataError, ConfigError: something in the recipe cannot work; nothing was written.
    """
    directory = RunDirectory(Path(recipe.output))
    directory.refuse_unless_writable(overwrite)
    with libraries_quiet():
        prepared = prepare(recipe, file)
        examples = prepare_examples(prepared)
        plan = prepared.plan
        display.say(prepared.data.description)
        display.say(
            f"{recipe.method['name']} on {prepared.source.name}: {len(plan.modules)} modules of total rank "
            f"{plan.rank:,}, {plan.trainable:,} trainable parameters ({plan.trainable / plan.total:.2%} of the model)"
        )
        if plan.left_out:
            display.say(plan.left_out)
        return _run(prepared, examples, directory, display)


def rehearse(recipe: Recipe, file: str | Path) -> Plan:
    """Check a recipe as `train` does, and tell what it would adapt; loads no weights and writes nothing.

    Raises:
        RecipeError, DataError, ConfigError: something in the recipe cannot work.
    """
    with libraries_quiet():
        prepared = prepare(recipe, file)
        prepare_examples(prepared)
        return prepared.plan


def _run(prepared: Prepared, examples: Examples, directory: RunDirectory, display: Display) -> dict[str, Any]:
    recipe, task = prepared.recipe, prepared.task
    memory = PeakMemory()
    model = adapted(pretrained(prepared.source, task, recipe), prepared.config, recipe.train.seed)
    training_params = reading.trainable_parameters(model)
    directory.start()
    atomic.write_text(directory.recipe, recipe_text(recipe))
    with EventLog(directory.log) as log:
        ranks = prepared.config.callback() if isinstance(prepared.config, Baseline) else RankCallback()
        events = EventCallback(log, ranks)
        callbacks = [ranks, events, DisplayCallback(display, task.metric)]
        if (patience := recipe.train.early_stopping_patience) is not None:
            callbacks.append(RankEarlyStoppingCallback(ranks, patience))
        trainer = build_trainer(
            prepared,
            model,
            examples.tokenizer,
            train=examples.train,
            evaluation=examples.evaluation,
            callbacks=callbacks,
        )
        ranks.put_first(trainer)
        log.write(
            "start",
            method=recipe.method["name"],
            model=prepared.source.name,
            task=task.name,
            metric=task.metric,
            seed=recipe.train.seed,
            data=prepared.data.description,
        )
        before = scores_only(trainer.evaluate())
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        movement = _movement(ranks)
        # Before the final scores: they are to be those of the file that is saved.
        compacted = _compact(model)
        after = scores_only(trainer.evaluate()) if compacted else _final_scores(trainer, events)
        log.write("end", step=trainer.state.global_step, seconds=seconds)
    atomic.write_folder(directory.adapter, lambda folder: model.save_pretrained(str(folder)))
    atomic.write_json(directory.ranks, {"final": reading.ranks(model), **movement})
    draw_run(directory)
    metrics = {
        "method": recipe.method["name"],
        "task": task.name,
        "metric": task.metric,
        "before": before[task.metric],
        "after": after[task.metric],
        **_sizes(model),
        "training_params": training_params,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "samples_per_second": _examples_seen(trainer) / seconds,
        "peak_memory_mb": memory.megabytes(),
        "peak_memory_kind": memory.kind,
        "adapter_bytes": sum(file.stat().st_size for file in directory.adapter.glob("*.safetensors")),
        "seed": recipe.train.seed,
        "scores": {"before": before, "after": after},
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


def _final_scores(trainer: Trainer, events: EventCallback) -> dict[str, float]:
    """The scores of the model as it is now; an evaluation after the very last step is not repeated."""
    unchanged = not trainer.args.load_best_model_at_end
    if unchanged and events.latest_scores_step == trainer.state.global_step:
        return events.latest_scores
    return scores_only(trainer.evaluate())


def _movement(ranks: RankCallback) -> dict[str, Any]:
    """What `ranks.json` tells about ranks that moved: every change, and the components' importance at the end.

    For ranks that were drawn: how many steps trained each.
    """
    if ranks.controller is None:
        return {"history": history_records(ranks.history)}
    if drawn := ranks.controller.drawn():
        return {"history": [], "drawn": drawn}
    return {"history": history_records(ranks.history), "importance": ranks.controller.importance()}


def _compact(model: PeftModel | PeftMixedModel) -> bool:
    """Drop the components that were pruned for good; whether there were any."""
    before = ranktune.active_parameters(model)
    ranktune.compact(model)
    return ranktune.active_parameters(model) != before


def _examples_seen(trainer: Trainer) -> int:
    args = trainer.args
    return trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _sizes(model: PeftModel | PeftMixedModel) -> dict[str, int]:
    """Parameter counts and the total rank. `total_params` is the model with its adapter."""
    return {
        "trainable_params": reading.final_parameters(model),
        "active_params": reading.active_parameters(model),
        "total_params": sum(parameter.numel() for parameter in model.parameters()),
        "total_rank": sum(reading.ranks(model).values()),
    }
