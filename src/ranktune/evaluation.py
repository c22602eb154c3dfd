"""`ranktune evaluate` as a function: rebuild a finished run from its directory and score it again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import Trainer

from ranktune.other_adapter import fitting
from ranktune.recipe import load_recipe
from ranktune.run.directory import RunDirectory
from ranktune.run.display import Display, DisplayCallback
from ranktune.run.events import scores_only
from ranktune.run.model import pretrained, restored
from ranktune.run.prepare import prepare
from ranktune.run.session import build_trainer, libraries_quiet
from ranktune.tasks import Task

Split = Literal["evaluation", "train"]

# What only training needs; scoring neither stops early nor writes checkpoints nor reports to trackers.
_SCORING_ONLY = (
    "train.early_stopping_patience=null",
    "train.eval_every=never",
    "train.save_every=never",
    "train.lr_scheduler=linear",
    "train.report_to=[]",
)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a finished run, and how they compare with what it recorded.

    `same_data` is false when the data is not what the run was trained and scored on. `recorded` holds the run's own
    scores after training, on the evaluation split only. `adapter` is what was scored in place of the run's own.
    """

    metric: str
    scores: dict[str, float]
    recorded: dict[str, float] | None
    same_data: bool
    adapter: Path | None = None

    @property
    def value(self) -> float:
        """The main metric."""
        return self.scores[self.metric]


@dataclass(frozen=True)
class Scorer:
    """A finished run, rebuilt.

    Attributes:
        model: as the run left it. task: what the run was trained for.
        recorded: its `metrics.json`. same_data: see `Evaluation`.
        split: what the model is scored on. trainer: scores it.
    """

    model: nn.Module
    task: Task
    recorded: dict[str, Any]
    same_data: bool
    split: Split
    trainer: Trainer

    def scores(self) -> dict[str, float]:
        """Every score of the model as it is now."""
        return scores_only(self.trainer.evaluate())

    def loss(self, examples: int) -> float:
        """The mean loss of the model as it is now over the first examples of the split, without the task's scores."""
        split: Any = self.trainer.eval_dataset
        some = self.trainer.get_eval_dataloader(split.select(range(min(examples, len(split)))))
        output = self.trainer.evaluation_loop(some, "", prediction_loss_only=True)
        return (output.metrics or {})["eval_loss"]


@contextmanager
def rebuilt(
    output: Path, display: Display, split: Split = "evaluation", adapter: Path | None = None
) -> Iterator[Scorer]:
    """Rebuild the run in `output` from its recipe, its adapter and the base model, to score it on one of its splits.

    Args:
        adapter: the folder of another adapter, or of a whole model, to be scored in place of the run's own.

    Raises:
        RecipeError: there is no finished run, or its recipe no longer works here.
        DataError: its data is gone.
        AdapterFileError: `adapter` is none, or does not belong to the run's base model.
    """
    directory = RunDirectory(output)
    recorded = directory.read_metrics()
    recipe = load_recipe(directory.recipe, _SCORING_ONLY)
    with libraries_quiet(), tempfile.TemporaryDirectory() as scratch:
        # A Trainer makes its output directory: here it must not be the run's.
        prepared = prepare(recipe.model_copy(update={"output": scratch}), directory.recipe)
        tokenizer = prepared.task.load_tokenizer(prepared.source.path, prepared.source.revision)
        examples = prepared.data.evaluation if split == "evaluation" else prepared.data.train
        base = pretrained(prepared.source, prepared.task, recipe)
        scored = directory.adapter if adapter is None else fitting(adapter, directory.adapter, base, prepared.source)
        model = restored(base, scored)
        trainer = build_trainer(
            prepared,
            model,
            tokenizer,
            train=None,
            evaluation=prepared.task.tokenize(examples, tokenizer),
            callbacks=[DisplayCallback(display, metric=None)],
        )
        yield Scorer(
            model=model,
            task=prepared.task,
            recorded=recorded,
            same_data=recorded["data"]["fingerprint"] == prepared.data.fingerprint,
            split=split,
            trainer=trainer,
        )


def evaluate(output: Path, display: Display, split: Split = "evaluation", adapter: Path | None = None) -> Evaluation:
    """Score the run in `output` on one of its splits, from its recipe, its adapter and the base model.

    Args:
        adapter: what `squeeze`, `export` or `merge` made of the run, or any other adapter for its base model, to be
            scored in place of the run's own.

    Raises:
        RecipeError: there is no finished run, or its recipe no longer works here.
        DataError: its data is gone.
        AdapterFileError: `adapter` is none, or does not belong to the run's base model.
    """
    with rebuilt(output, display, split, adapter) as scorer:
        return Evaluation(
            metric=scorer.task.metric,
            scores=scorer.scores(),
            recorded=scorer.recorded["scores"]["after"] if split == "evaluation" else None,
            same_data=scorer.same_data,
            adapter=adapter,
        )
