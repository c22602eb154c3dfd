"""Whether a run may go on under the settings it is given now: what may change, what needs a new plan, what may not."""

from __future__ import annotations

from typing import Any

from ranktune.baselines import Baseline
from ranktune.errors import RecipeError
from ranktune.integrations.trainer import RunShape
from ranktune.recipe import Recipe
from ranktune.run.checkpoints import Checkpoint
from ranktune.run.prepare import Examples, Prepared

# These change neither what is trained nor in which order.
_FREE = {
    "train.eval_batch_size",
    "train.eval_every",
    "train.save_every",
    "train.save_total_limit",
    "train.logging_steps",
    "train.report_to",
    "train.num_workers",
}
# The best evaluation is what such a run ends with.
_FREE_UNLESS_STOPPING_EARLY = {"train.eval_every", "train.save_every"}
# These change how long the run is, or its examples; the optimizer's state is still worth having.
_REPLANNED = {
    "train.epochs",
    "train.max_steps",
    "train.batch_size",
    "train.gradient_accumulation",
    "train.early_stopping_patience",
    "data.source",
    "data.config",
    "data.revision",
    "data.train",
    "data.evaluation",
    "data.evaluation_fraction",
    "data.max_train_examples",
    "data.max_eval_examples",
}


def check_changes(before: Recipe, now: Recipe, replan: bool) -> None:
    """Refuse overrides that would make another run of it.

    Raises:
        RecipeError: naming the keys, and what could be done instead.
    """
    free = _FREE if before.train.early_stopping_patience is None else _FREE - _FREE_UNLESS_STOPPING_EARLY
    changed = {key: words for key, words in _differences(before, now).items() if key not in free}
    barred = {key: words for key, words in changed.items() if key not in _REPLANNED}
    if barred:
        raise RecipeError(
            f"--resume: {_listed(barred)} would make another run of it: what was trained so far was trained otherwise, "
            f"and the optimizer's state goes with it. Start a new run with output=...; may change: "
            f"{', '.join(sorted(free))}; with --replan also: {', '.join(sorted(_REPLANNED))}."
        )
    if changed and not replan:
        raise RecipeError(f"--resume: {_listed(changed)}. {_WHY_REPLAN}")


def check_shape(checkpoint: Checkpoint, prepared: Prepared, examples: Examples, replan: bool) -> None:
    """Refuse a checkpoint that was written on other data or on the way to another number of steps.

    Raises:
        RecipeError: telling what is different; or that nothing remains to be trained.
    """
    steps, config = examples.steps, prepared.config
    if isinstance(config, Baseline) and not config.resumable:
        raise RecipeError(
            f"--resume: {config.method_name} keeps its running averages in no checkpoint, so it cannot go on where it "
            "stopped. Train it again with --overwrite."
        )
    if replan:
        if checkpoint.step >= steps.total:
            raise RecipeError(
                f"--resume: {checkpoint.step} steps are done, and the run would now have {steps.total} "
                f"({steps.arithmetic}): nothing remains to be trained. Raise train.epochs or train.max_steps."
            )
        return
    shape = RunShape.of(prepared.arguments, steps.total, steps.epochs)
    recorded = checkpoint.record_of("EventCallback")
    changes = shape.changes_from(recorded.get("shape", {}))
    if recorded.get("fingerprint", prepared.data.fingerprint) != prepared.data.fingerprint:
        changes.append("the data is not the data it was trained on (its fingerprint changed)")
    if changes:
        raise RecipeError(
            f"--resume: {checkpoint.path.name} belongs to another run: {'; '.join(changes)}. {_WHY_REPLAN}"
        )


_WHY_REPLAN = (
    "Learning rate and ranks follow schedules that were laid out over the whole run, and so does the order of the "
    "examples. Resume without the change, or accept it with --replan: the rank schedule then begins anew from the "
    "present ranks, over the steps that remain."
)


def _differences(before: Recipe, now: Recipe) -> dict[str, str]:
    """Dotted keys that differ, and how; the output directory is where the run is."""
    old, new = _flat(before.resolved()), _flat(now.resolved())
    keys = [key for key in {**old, **new} if key != "output" and old.get(key) != new.get(key)]
    return {key: f"'{key}' was {old.get(key)!r}, now {new.get(key)!r}" for key in keys}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and not prefix
        flat.update(_flat(value, f"{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _listed(changes: dict[str, str]) -> str:
    return "; ".join(changes.values())
