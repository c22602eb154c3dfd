"""From a recipe's data section to two clean splits whose columns are named by role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ranktune.errors import DataError, RecipeError
from ranktune.tasks.base import Data
from ranktune.tasks.chat import asked
from ranktune.tasks.examples import label_like_train, label_train, take_roles
from ranktune.tasks.quiet import quiet_datasets
from ranktune.tasks.roles import choose_task
from ranktune.tasks.sources import RawData, check_place, load_source
from ranktune.tasks.splits import fingerprint, sample, split_off
from ranktune.tasks.vocabulary import check_words

if TYPE_CHECKING:
    import datasets

    from ranktune.recipe import DataRecipe

_EVALUATION_SEED = 0  # every run scores itself on the same sample, whatever seed it trains with


def check_source(recipe: DataRecipe) -> None:
    """Check what can be checked without reading the examples: words, files, formats, a csv file's columns.

    Raises RecipeError for an unknown task, role or metric, DataError for a missing or unusable file or
    column.
    """
    check_words(recipe.task, recipe.columns, recipe.metric, recipe.replace, recipe.loss_on)
    check_place(recipe)


def load_data(recipe: DataRecipe, seed: int) -> Data:
    """Load, check and split the examples; `seed` only draws the sample of `max_train_examples`.

    Raises DataError, naming the row or column, for anything missing, empty or contradictory; rows are dropped
    only where `skip_incomplete` asks for it, and counted in the description.
    """
    check_source(recipe)
    with quiet_datasets():
        raw = load_source(recipe)
        task, roles = choose_task(recipe.task, recipe.columns, raw.train.column_names, raw.train.__getitem__)
        check_words(task, recipe.columns, recipe.metric, recipe.replace, recipe.loss_on)
        _check_replaced_roles(recipe, roles)
        train, evaluation, labels = _labelled_splits(raw, task, roles, recipe)
        skipped = len(raw.train) + len(raw.evaluation or ()) - len(train) - len(evaluation)
        train = sample(train, recipe.max_train_examples, seed)
        evaluation = sample(evaluation, recipe.max_eval_examples, _EVALUATION_SEED)
        train, evaluation = _held_out(train, evaluation, recipe.validation_fraction)
        classes = f" in {len(labels)} classes" if labels else ""
        return Data(
            train=train,
            evaluation=evaluation,
            task=task,
            labels=labels,
            description=f"{raw.origin}: {task}{classes}, {len(train):,} to train, {len(evaluation):,} to evaluate"
            + (f" ({skipped:,} incomplete left out)" if skipped else ""),
            fingerprint=fingerprint([train, evaluation]),
        )


def _check_replaced_roles(recipe: DataRecipe, roles: dict[str, str]) -> None:
    for role in recipe.replace:
        if role not in roles:
            raise RecipeError(f"data.replace: no column plays the role '{role}'; the roles here: {', '.join(roles)}.")


def _labelled_splits(
    raw: RawData, task: str, roles: dict[str, str], recipe: DataRecipe
) -> tuple[datasets.Dataset, datasets.Dataset, list[str] | None]:
    options = {"skip_incomplete": recipe.skip_incomplete, "replace": recipe.replace}
    train, labels = label_train(take_roles(raw.train, roles, task, "train", **options), task, recipe.labels)
    if raw.evaluation is not None:
        evaluation = take_roles(raw.evaluation, roles, task, "evaluation", **options)
        return train, label_like_train(evaluation, task, labels), labels
    kept, held_out = split_off(_inputs(train), recipe.evaluation_fraction)
    split = train.select(kept), train.select(held_out)
    if labels is not None and recipe.labels is None:
        _refuse_untrained_classes(*split, labels)
    return *split, labels


def _held_out(
    train: datasets.Dataset, evaluation: datasets.Dataset, fraction: float | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """With a fraction, a part of the training split takes the place of the evaluation split, which nobody then sees."""
    if fraction is None:
        return train, evaluation
    kept, held_out = split_off(_inputs(train), fraction)
    return train.select(kept), train.select(held_out)


def _refuse_untrained_classes(train: datasets.Dataset, evaluation: datasets.Dataset, labels: list[str]) -> None:
    unseen = sorted(set(evaluation["label"]) - set(train["label"]))
    if unseen:
        names = ", ".join(repr(labels[number]) for number in unseen)
        raise DataError(
            f"data.evaluation_fraction: every example of {names} fell into the evaluation split, so it cannot be "
            "learnt. Give more examples of it, another fraction or a split of your own (data.evaluation); or list all "
            "classes in data.labels if it is right."
        )


def _inputs(dataset: datasets.Dataset) -> list[str]:
    """What a model reads of every example, as one text: equal inputs must not be in both splits."""
    if "messages" in dataset.column_names:
        return [asked(messages) for messages in dataset["messages"]]
    columns = [dataset[role] for role in dataset.column_names if role not in ("label", "target", "completion")]
    return ["\0".join(cells) for cells in zip(*columns, strict=True)]
