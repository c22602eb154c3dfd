"""The words a recipe can use for data: task names, the roles a column can play in each, and the metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ranktune.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class TaskWords:
    """What a recipe can say about one task.

    `layouts`: the sets of roles its columns can play, the first that fits wins; `optional`: roles that may be
    absent. `metrics`: name -> whether greater is better; the first is the default main metric.
    """

    layouts: tuple[tuple[str, ...], ...]
    metrics: dict[str, bool]
    optional: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role a column can play in this task."""
        return tuple(dict.fromkeys([role for layout in self.layouts for role in layout] + list(self.optional)))


TASKS = {
    "classification": TaskWords(
        layouts=(("text", "label"),),
        optional=("text_pair",),
        metrics={"accuracy": True, "f1": True, "matthews": True},
    ),
    "regression": TaskWords(
        layouts=(("text", "label"),),
        optional=("text_pair",),
        metrics={"pearson": True, "spearman": True, "mse": False},
    ),
    "causal-lm": TaskWords(
        layouts=(("prompt", "completion"), ("messages",), ("text",)),
        metrics={"nats_per_token": False, "perplexity": False, "nats_per_character": False},
    ),
    "seq2seq": TaskWords(
        layouts=(("source_text", "target"),),
        metrics={"exact_match": True, "character_error_rate": False},
    ),
}


def check_words(
    task: str | None, columns: Iterable[str], metric: str | None, replaced: Iterable[str] = (), loss_on: str = ""
) -> None:
    """Raise RecipeError for a task, a role (of a column, or to replace in) or a metric that does not exist or fit."""
    if task is not None and task not in TASKS:
        raise RecipeError(f"data.task: unknown task '{task}'.{did_you_mean(task, TASKS)} Known: {', '.join(TASKS)}.")
    considered = [TASKS[task]] if task else list(TASKS.values())
    where = f"the task '{task}'" if task else "any task"
    roles = list(dict.fromkeys(role for words in considered for role in words.roles))
    for field, used in (("columns", columns), ("replace", replaced)):
        for role in used:
            if role not in roles:
                raise RecipeError(
                    f"data.{field}: '{role}' is not a role of {where}.{did_you_mean(role, roles)} Known: "
                    f"{', '.join(roles)}."
                )
    if "label" in replaced:
        raise RecipeError("data.replace: 'label' holds no text; replace in the roles that are texts.")
    if loss_on == "everything" and task not in (None, "causal-lm"):
        raise RecipeError(f"data.loss_on: 'everything' is for causal-lm, not for {where}.")
    metrics = list(dict.fromkeys(name for words in considered for name in words.metrics))
    if metric is not None and metric not in metrics:
        raise RecipeError(
            f"data.metric: '{metric}' is not a metric of {where}.{did_you_mean(metric, metrics)} Known: "
            f"{', '.join(metrics)}."
        )
