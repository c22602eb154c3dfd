"""What the command line trains on: data sources, tasks and their scores, and where models come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ranktune.tasks.base import Data, Task
from ranktune.tasks.causal_lm import CausalLM
from ranktune.tasks.classification import Classification
from ranktune.tasks.data import check_source, load_data
from ranktune.tasks.models import ModelSource, resolve_model
from ranktune.tasks.regression import Regression
from ranktune.tasks.seq2seq import Seq2Seq

if TYPE_CHECKING:
    from ranktune.recipe import DataRecipe

__all__ = ["Data", "ModelSource", "Task", "build_task", "check_source", "load_data", "resolve_model"]

_TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Regression, CausalLM, Seq2Seq)}


def build_task(data: DataRecipe, loaded: Data) -> Task:
    """Return the task for the loaded data.

    Raises RecipeError when the recipe's metric is not one of its metrics.
    """
    return _TASKS[loaded.task](data, loaded)
