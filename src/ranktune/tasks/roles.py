"""Which column plays which role, and which task the data is for.

What the recipe says, else what is obvious.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ranktune.errors import DataError, did_you_mean
from ranktune.tasks.labels import task_of
from ranktune.tasks.vocabulary import TASKS

_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
)
_TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "comment",
    "question",
    "document",
    "utterance",
    "message",
    "tweet",
)
_LABELS = ("label", "labels", "class", "category", "target", "score", "rating", "sentiment")
_COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "response"))
_CONVERSATIONS = ("messages", "conversation", "conversations")
_TARGETS = (
    ("source_text", "target"),
    ("source_text", "target_text"),
    ("source", "target"),
    ("input_text", "target_text"),
    ("input", "target"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
)

# The sets of roles whose usual names tell the task; a text alone does not.
_TELLING = (
    ("classification", ("text", "label")),
    ("causal-lm", ("prompt", "completion")),
    ("causal-lm", ("messages",)),
    ("seq2seq", ("source_text", "target")),
)


def check_columns(given: Mapping[str, str], names: Collection[str], where: str = "") -> None:
    """Raise DataError when a role is given to a column that does not exist, or two roles to one column."""
    for role, column in given.items():
        if column not in names:
            raise DataError(
                f"data.columns.{role}: there is no column '{column}'{where}.{did_you_mean(column, names)} Columns: "
                f"{', '.join(names)}."
            )
    if len(set(given.values())) < len(given):
        raise DataError(f"data.columns: one column plays two roles: {dict(given)}.")


def assign(task: str, given: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return role -> column for `task`.

    Raises DataError, listing the columns, when a role is neither given nor obvious.
    """
    check_columns(given, names)
    for layout in TASKS[task].layouts:
        roles = _fit(layout, given, names)
        if roles is not None:
            return roles
    layouts = " or ".join(" + ".join(layout) for layout in TASKS[task].layouts)
    raise DataError(
        f"data.columns: the task '{task}' needs {layouts}, and it is not obvious which columns they are. Set "
        f"data.columns; columns: {', '.join(names)}."
    )


def candidates(given: Mapping[str, str], names: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the tasks that the columns are obviously for, each with its roles.

    Classification stands for regression too: which of the two it is can only be seen in the labels.
    Raises DataError when a given column does not exist.
    """
    check_columns(given, names)
    fits: dict[str, dict[str, str]] = {}
    for task, layout in _TELLING:
        if task not in fits and (roles := _fit(layout, given, names)):
            fits[task] = roles
    if not fits and (len(names) == 1 or "text" in given):
        # A text alone is a corpus to model; beside columns of unknown meaning it is not obvious.
        corpus = _fit(("text",), given, names)
        return {"causal-lm": corpus} if corpus else {}
    return fits


def choose_task(
    task: str | None, given: Mapping[str, str], names: Collection[str], values: Callable[[str], Sequence[Any]]
) -> tuple[str, dict[str, str]]:
    """Return the task and its role -> column; `values` gives a column's cells, if labels must decide.

    Raises DataError, listing the columns, when the task is not given and not obvious.
    """
    if task is not None:
        return task, assign(task, given, names)
    fits = candidates(given, names)
    if len(fits) != 1:
        reason = f"the columns fit {' and '.join(fits)}" if fits else "the columns are none of the usual ones"
        raise DataError(
            f"data.task: not obvious, {reason}. Set data.task ({', '.join(TASKS)}) and, where needed, "
            f"data.columns; columns: {', '.join(names)}."
        )
    ((task, roles),) = fits.items()
    if task != "classification":
        return task, roles
    labelled = task_of(values(roles["label"]))
    if labelled is None:
        raise DataError(
            f"data.task: not obvious, the column '{roles['label']}' holds many different values. Set data.task to "
            f"classification or regression, or choose the label in data.columns; columns: {', '.join(names)}."
        )
    return labelled, roles


def _fit(layout: tuple[str, ...], given: Mapping[str, str], names: Collection[str]) -> dict[str, str] | None:
    allowed = {*layout, "text_pair"} if "label" in layout else set(layout)
    if not given.keys() <= allowed:
        return None
    for option in _options(layout, names):
        if "text" in given:
            option.pop("text_pair", None)  # a text chosen by hand is the whole input unless its pair is chosen too
        roles = {**option, **given}
        if set(roles.values()) <= set(names) and len(set(roles.values())) == len(roles):
            return roles
    return None


def _options(layout: tuple[str, ...], names: Collection[str]) -> Iterator[dict[str, str]]:
    """Yield the usual column names for the layout's roles, the most telling first, spelled as in `names`."""
    spelled = {name.lower(): name for name in names}
    for columns in _usual(layout, names):
        yield {role: spelled.get(column, column) for role, column in columns.items()}


def _usual(layout: tuple[str, ...], names: Collection[str]) -> Iterator[dict[str, str]]:
    if layout == ("text", "label"):
        for label in _LABELS:
            yield from ({"text": first, "text_pair": second, "label": label} for first, second in _PAIRS)
            yield from ({"text": text, "label": label} for text in _TEXTS)
    elif layout == ("messages",):
        yield from ({"messages": name} for name in _CONVERSATIONS)
    elif layout == ("text",):
        yield from ({"text": text} for text in _TEXTS)
        if len(names) == 1:
            yield {"text": next(iter(names))}
    else:
        pairs = _COMPLETIONS if "prompt" in layout else _TARGETS
        yield from (dict(zip(layout, pair, strict=True)) for pair in pairs)
