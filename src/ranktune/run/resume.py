"""Whether a run may go on under the settings it is given now: what may change, what needs a new plan, what may not."""

from __future__ import annotations

import json
from pathlib import Path
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


def check_changes(before: dict[str, Any], now: Recipe, replan: bool) -> None:
    """Refuse what would make another run of it, whether it was set on the command line or edited in `recipe.yaml`.

    A base model that lies elsewhere now, because its old place is gone, is taken for the same one; data in another
    folder is recognised by its fingerprint (`check_shape`).

    Args:
        before: the resolved recipe that the checkpoint was trained with.
        now: the recipe to go on with.
        replan: the length of the run and its data may change.

    Raises:
        RecipeError: naming the keys, and what could be done instead.
    """
    stops_early = before["train"].get("early_stopping_patience") is not None
    free = _FREE - _FREE_UNLESS_STOPPING_EARLY if stops_early else _FREE
    changed = {key: words for key, words in _differences(before, now).items() if key not in free}
    if _moved(before["model"], now.model):
        changed.pop("model", None)
    if all(Path(source).is_absolute() for source in (before["data"]["source"], now.data.source)):
        changed.pop("data.source", None)
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


def plain(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as it comes back from a checkpoint's JSON: what differs after that differs in value."""
    return json.loads(json.dumps(recipe.resolved()))


def _moved(before: str, now: str) -> bool:
    return Path(before).is_absolute() and not Path(before).exists() and Path(now).is_dir()


def _differences(before: dict[str, Any], now: Recipe) -> dict[str, str]:
    """Dotted keys that differ, and how; the output directory is where the run is.

    A key that only one of the two has is of another version of ranktune or PEFT.
    """
    old, new = _flat(before), _flat(plain(now))
    keys = [key for key in old.keys() & new.keys() if key != "output" and old[key] != new[key]]
    return {key: f"'{key}' was {old[key]!r}, now {new[key]!r}" for key in sorted(keys, key=list(new).index)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and not prefix
        flat.update(_flat(value, f"{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _listed(changes: dict[str, str]) -> str:
    return "; ".join(changes.values())
