"""`ranktune truncate` as a function: a nested adapter (dylora) as plain LoRA, cut at one rank, or to a size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ranktune
from ranktune.errors import RecipeError
from ranktune.evaluation import Scorer, Split, rebuilt
from ranktune.export import refuse_occupied
from ranktune.exporting import ExportedRun, export_trained
from ranktune.plain_lora import Profile
from ranktune.rank_budget import ranks_by_energy, ranks_by_loss
from ranktune.rank_curve import RankCurve, curve_of
from ranktune.rank_setting import at_rank, refuse_untrained_rank, trained_ranks
from ranktune.run.directory import folder_beside
from ranktune.run.display import Display

By = Literal["energy", "loss"]


@dataclass(frozen=True)
class Spending:
    """What a budget of parameters went to, and what it bought.

    Attributes:
        budget: in parameters. by: how ranks were chosen. ranks: module name to rank.
        metric: the task's main score. split: what it is of.
        score: at these ranks. uniform_rank, uniform_parameters, uniform_score: of the largest rank for all modules that
            is within the budget too. full_parameters, full_score: of the whole adapter.
    """

    budget: int
    by: By
    ranks: dict[str, int]
    metric: str
    split: Split
    score: float
    uniform_rank: int
    uniform_parameters: int
    uniform_score: float
    full_parameters: int
    full_score: float


@dataclass(frozen=True)
class Truncated:
    """What was written.

    Attributes:
        folder: the adapter. rank: b, the highest where modules have their own.
        parameters: numbers in the adapter, without a head.
        written: its file, and its outputs in stock PEFT.
        curve: with a share to choose by, what was chosen from. spending: with a budget, what it went to.
        same_data: whether scores, if any, are of the data that the run was trained and scored on.
    """

    folder: Path
    rank: int
    parameters: int
    written: ExportedRun
    curve: RankCurve | None
    spending: Spending | None
    same_data: bool


def truncate(
    output: Path,
    display: Display,
    *,
    rank: int | None = None,
    within: str | None = None,
    budget: int | None = None,
    by: By = "loss",
    evaluations: int = 500,
    examples: int = 256,
    split: Split = "evaluation",
    out: Path | None = None,
    profile: Profile | None = None,
) -> Truncated:
    """Cut a finished run's adapter at a rank that is given, at the smallest one that is good enough, or to a size.

    What is written is loaded in a process of stock PEFT, and its outputs are compared, before the folder appears.

    Args:
        output: of a finished run with a nested adapter.
        display: where progress is shown.
        rank: the rank.
        within: instead, how much of the best rank's score may be lost on the split, such as "1%".
        budget: instead, how many parameters the adapter may have, each module with a rank of its own.
        by: with a budget, `ranktune.rank_budget.ranks_by_loss` or `ranks_by_energy`.
        evaluations, examples: by loss, how often it is measured at most, and on how many of the split's examples.
        split: what scores and losses are of.
        out: the folder to make, which must not exist or be empty; ``OUT-rankB`` or ``OUT-budgetN`` by default.
        profile: of `ranktune.export_lora`; with a budget ``compact`` by default, since filling up with zeros would undo
            it, else ``uniform``.

    Raises:
        RecipeError: not exactly one of rank, within and budget is given, or there is no finished run.
        ConfigError: the adapter is not nested or was not trained at the rank, the budget is too small, or the folder is
            occupied.
        DataError: the run's data is gone.
        ExportError: what was written gives other outputs in stock PEFT; nothing was kept.
    """
    if sum(choice is not None for choice in (rank, within, budget)) != 1:
        raise RecipeError(
            "give one of --rank (such as 4), --within (such as 1%) and --budget (a number of parameters): where to cut."
        )
    share = None if within is None else share_of(within)
    curve, spending, ranks = None, None, None
    if out is not None:
        refuse_occupied(out)
    with rebuilt(output, display, split) as scorer:
        model = scorer.model
        if share is not None:
            curve = curve_of(scorer, display)
            rank = curve.smallest_within(share).rank
        if budget is not None:
            ranks = _chosen(scorer, display, budget, by, evaluations, examples)
            spending = _spending(scorer, display, budget, by, ranks)
        if rank is not None:
            refuse_untrained_rank(model, rank, "default")
        with at_rank(model, ranks or rank or {}):
            parameters = ranktune.active_parameters(model)
            highest = max(ranktune.ranks(model).values())
    name = f"rank{rank}" if budget is None else f"budget{budget}"
    folder = out or folder_beside(output, name)
    written = export_trained(output, folder, profile or ("uniform" if budget is None else "compact"), ranks or rank)
    return Truncated(folder, highest, parameters, written, curve, spending, scorer.same_data)


def _chosen(scorer: Scorer, display: Display, budget: int, by: By, evaluations: int, examples: int) -> dict[str, int]:
    """Module name to rank."""
    if by == "energy":
        return ranks_by_energy(scorer.model, budget)
    seen = 0

    def measure() -> float:
        nonlocal seen
        seen += 1
        loss = scorer.loss(examples)
        if seen % 20 == 0:
            display.say(f"{seen} of at most {evaluations} evaluations")
        return loss

    return ranks_by_loss(scorer.model, budget, measure, evaluations)


def _spending(scorer: Scorer, display: Display, budget: int, by: By, ranks: dict[str, int]) -> Spending:
    """Score the ranks, beside the largest rank for all modules that is within the budget, and the whole adapter."""
    model, metric = scorer.model, scorer.task.metric
    sizes = {}
    for b in trained_ranks(model):
        with at_rank(model, b):
            sizes[b] = ranktune.active_parameters(model)
    uniform, full = max(b for b, size in sizes.items() if size <= budget), max(sizes)
    scores = []
    for words, cut in (("the chosen ranks", ranks), (f"rank {uniform}", uniform), ("the whole adapter", full)):
        display.say(f"scoring {words}")
        with at_rank(model, cut):
            scores.append(scorer.scores()[metric])
    return Spending(
        budget=budget,
        by=by,
        ranks=ranks,
        metric=metric,
        split=scorer.split,
        score=scores[0],
        uniform_rank=uniform,
        uniform_parameters=sizes[uniform],
        uniform_score=scores[1],
        full_parameters=sizes[full],
        full_score=scores[2],
    )


def share_of(text: str) -> float:
    """``"1%"`` to 0.01.

    Raises:
        RecipeError: it is no percentage from 0 to 100.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip())
    if found is None or not 0.0 <= float(found[1]) < 100.0:
        raise RecipeError(f"--within {text!r}: write a percentage of the best score, such as 1% or 0.5%.")
    return float(found[1]) / 100.0
