"""`ranktune train` as a function: check everything, load the model, score, train, score again, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel
from transformers import Trainer, TrainerCallback

import ranktune
from ranktune.baselines import Baseline, reading
from ranktune.config import RankConfig
from ranktune.errors import RecipeError
from ranktune.foreign_start import load_start
from ranktune.history import history_records
from ranktune.integrations.trainer import RankCallback, RankEarlyStoppingCallback
from ranktune.recipe import Recipe, load_recipe, recipe_text
from ranktune.run import atomic
from ranktune.run.checkpoints import Checkpoint, Found, find_checkpoint, refuse_damaged_best
from ranktune.run.directory import RunDirectory
from ranktune.run.display import Display, DisplayCallback
from ranktune.run.events import EventCallback, EventLog, scores_only
from ranktune.run.manifest import NAME as MANIFEST
from ranktune.run.memory import PeakMemory
from ranktune.run.model import adapted, pretrained
from ranktune.run.prepare import Examples, Prepared, prepare, prepare_examples
from ranktune.run.result import save_result
from ranktune.run.resume import check_changes, check_shape, plain
from ranktune.run.saving import SavingCallback
from ranktune.run.session import build_trainer, libraries_quiet
from ranktune.run.targets import Plan


def train(
    recipe: Recipe,
    file: str | Path,
    display: Display,
    *,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train what the recipe says and leave the result in its output directory.

    Args:
        recipe: as `load_recipe` returns it.
        file: the recipe's file, for messages.
        display: where progress is shown.
        overwrite: replace a run that is already in the output directory, once the new one is ready to start.
        callbacks: further Trainer callbacks.

    Returns:
        The content of `metrics.json`.

    Raises:
        RecipeError, DataError, ConfigError: something in the recipe cannot work; nothing was written.
    """
    directory = RunDirectory(Path(recipe.output))
    directory.refuse_unless_writable(overwrite)
    with libraries_quiet():
        prepared = prepare(recipe, file, begins=True)
        examples = prepare_examples(prepared)
        _introduce(prepared, examples, display)
        return _run(prepared, examples, directory, display, further=callbacks)


def resume(output: Path, overrides: Sequence[str], display: Display, *, replan: bool = False) -> dict[str, Any]:
    """Go on with the run in a directory from its newest whole checkpoint, as if it had never stopped.

    A run that was stopped before its first checkpoint starts anew; a finished one is left as it is.

    Args:
        output: the run's directory, whose own recipe counts.
        overrides: recipe keys to set, of those that do not make another run of it.
        display: where progress is shown.
        replan: the run may get another length or other data, and its rank schedule begins anew.

    Returns:
        The content of `metrics.json`.

    Raises:
        RecipeError, DataError, ConfigError: there is no run here, or it cannot go on like this; nothing was changed.
        AdapterFileError: the best checkpoint, which the run is to end with, is damaged.
    """
    directory = RunDirectory(output)
    before = load_recipe(directory.required_recipe())
    recipe = load_recipe(directory.recipe, overrides)
    if recipe.output != before.output:
        raise RecipeError(f"--resume: 'output' is {output} itself; a copy of the run can be resumed where it lies.")
    recipe = recipe.model_copy(update={"output": str(output)})
    check_changes(plain(before), recipe, replan)
    found = find_checkpoint(directory.checkpoints)
    if found.newest is not None and (trained := found.newest.record_of("EventCallback").get("recipe")):
        check_changes(trained, recipe, replan)
    if directory.metrics.exists() and not replan:
        metrics = directory.read_metrics()
        display.say(f"the run in {output} is finished after {metrics['steps']:,} steps: there is nothing to resume.")
        return metrics
    for path, fault in found.torn.items():
        display.say(f"{path.name} is not whole: {fault}")
    if found.newest is not None and recipe.train.early_stopping_patience is not None:
        _look_for_best(directory, found.newest, display)
    with libraries_quiet():
        prepared = prepare(recipe, directory.recipe, begins=found.newest is None)
        examples = prepare_examples(prepared)
        _introduce(prepared, examples, display, resumed=found.newest is not None)
        if found.newest is None:
            display.say("there is no whole checkpoint: the run starts anew, from step 0")
        else:
            check_shape(found.newest, prepared, examples, replan)
            if not found.newest.verified:
                display.say(
                    f"{found.newest.path.name} has no {MANIFEST}, as those of earlier versions: its files are "
                    "complete, but whether they were altered cannot be told"
                )
            done, total = found.newest.step, examples.steps.total
            display.say(f"going on from {found.newest.path.name}: {done:,} of {total:,} steps are done")
        return _run(prepared, examples, directory, display, found, replan=replan)


def _look_for_best(directory: RunDirectory, newest: Checkpoint, display: Display) -> None:
    """A run that stops early ends with its best checkpoint: now is the time to find out that there is none.

    Raises:
        AdapterFileError: it is there, and not as it was written.
    """
    step = newest.state.get("best_global_step")
    if step is None:
        return
    refuse_damaged_best(directory.checkpoints, step)
    if not (best := directory.checkpoints / f"checkpoint-{step}").is_dir():
        display.say(
            f"{best.name}, the best so far, is gone: unless a later one is better, the run ends as at its last step"
        )


def rehearse(recipe: Recipe, file: str | Path) -> Plan:
    """Check a recipe as `train` does, and tell what it would adapt; loads no weights and writes nothing.

    Raises:
        RecipeError, DataError, ConfigError: something in the recipe cannot work.
    """
    with libraries_quiet():
        prepared = prepare(recipe, file, begins=True)
        examples = prepare_examples(prepared)
        return replace(prepared.plan, end=examples.end)


def _introduce(prepared: Prepared, examples: Examples, display: Display, *, resumed: bool = False) -> None:
    """Say what is trained; ranks and sizes only where they are those that training begins with."""
    plan = prepared.plan
    display.say(prepared.data.description)
    named = f"{prepared.recipe.method['name']} on {prepared.source.name}"
    if resumed:
        display.say(named)
    else:
        display.say(
            f"{named}: {len(plan.modules)} modules of total rank {plan.rank:,}, {plan.trainable:,} trainable "
            f"parameters ({plan.trainable / plan.total:.2%} of the model)"
        )
        if plan.start != plan.adapter:
            display.say(f"of these {plan.start:,} are in the adapter at the start; the others are room to grow in")
    if examples.end:
        display.say(f"at the end: {examples.end}")
    if (start := prepared.start) is not None:
        trained_on = f"trained on {start.base_model}" if start.base_model else "which names no base model"
        display.say(f"starting from {start.folder} ({start.saved.method}), {trained_on}")
    config = prepared.config
    advice = config.advice(examples.steps.total) if isinstance(config, RankConfig) else None
    for more in (plan.quantised, plan.left_out, advice):
        if more:
            display.say(more)


def _run(
    prepared: Prepared,
    examples: Examples,
    directory: RunDirectory,
    display: Display,
    found: Found | None = None,
    *,
    replan: bool = False,
    further: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    task, config, seed = prepared.task, prepared.config, prepared.recipe.train.seed
    memory = PeakMemory()
    model = adapted(pretrained(prepared.source, task, prepared.recipe), config, seed)
    if prepared.start is not None:
        load_start(model, prepared.start)
    training_params = reading.trainable_parameters(model)
    resumed = None if found is None else found.newest
    with directory.held():
        if found is None or resumed is None:
            directory.start()
        else:
            directory.reopen()
            found.remove_torn()
        atomic.write_text(directory.recipe, recipe_text(prepared.recipe))
        kept = {} if resumed is None else resumed.record_of("EventCallback")
        with EventLog(directory.log, kept.get("log_bytes")) as log:
            ranks = config.callback() if isinstance(config, Baseline) else RankCallback(replan=replan)
            events = EventCallback(log, ranks, prepared.data.fingerprint, plain(prepared.recipe), kept)
            shown = DisplayCallback(display, task.metric, ranks)
            trainer = _trainer(prepared, examples, model, ranks, [events, shown, *further])
            if resumed is None:
                log.write("start", **_facts(prepared))
                events.before = scores_only(trainer.evaluate())
                trainer.train()
            else:
                log.write("resume", step=resumed.step, replanned=replan)
                trainer.train(resume_from_checkpoint=str(resumed.path))
            movement = _movement(ranks)
            # Before the final scores: they are to be those of the file that is saved.
            compacted = _compact(model)
            after = scores_only(trainer.evaluate()) if compacted else _final_scores(trainer, events)
            log.write("end", step=trainer.state.global_step, seconds=events.seconds(), scores=after)
        return save_result(directory, prepared, trainer, events, after, movement, training_params, memory)


def _trainer(
    prepared: Prepared, examples: Examples, model: Any, ranks: RankCallback, callbacks: list[TrainerCallback]
) -> Trainer:
    patience = prepared.recipe.train.early_stopping_patience
    stopping = [] if patience is None else [RankEarlyStoppingCallback(ranks, patience)]
    trainer = build_trainer(
        prepared,
        model,
        examples.tokenizer,
        train=examples.train,
        evaluation=examples.evaluation,
        callbacks=[ranks, *callbacks, *stopping, SavingCallback()],
    )
    ranks.put_first(trainer)
    return trainer


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What the log says of a run at its start."""
    recipe, task = prepared.recipe, prepared.task
    return {
        "method": recipe.method["name"],
        "model": prepared.source.name,
        "task": task.name,
        "metric": task.metric,
        "seed": recipe.train.seed,
        "data": prepared.data.description,
    }


def _final_scores(trainer: Trainer, events: EventCallback) -> dict[str, float]:
    """The scores of the model as it is now; an evaluation after the very last step is not repeated."""
    unchanged = not trainer.args.load_best_model_at_end
    if unchanged and events.latest_scores_step == trainer.state.global_step:
        return events.latest_scores
    return scores_only(trainer.evaluate())


def _movement(ranks: RankCallback) -> dict[str, Any]:
    """What `ranks.json` tells about ranks that moved: every change of a rank and of the budget, and what is important.

    For ranks that were drawn: how many steps trained each.
    """
    if ranks.controller is None:
        return {"history": history_records(ranks.history)}
    if drawn := ranks.controller.drawn():
        return {"history": [], "drawn": drawn}
    return {
        "history": history_records(ranks.history),
        "budget": ranks.controller.budgets(),
        "importance": ranks.controller.importance(),
    }


def _compact(model: PeftModel | PeftMixedModel) -> bool:
    """Drop the components that were pruned for good; whether there were any."""
    before = ranktune.active_parameters(model)
    ranktune.compact(model)
    return ranktune.active_parameters(model) != before
