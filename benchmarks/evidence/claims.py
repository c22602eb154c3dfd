"""What the papers say of their methods, and whether the results on file point the same way, and how clearly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ranktune.compare.statistics import Interval, PairedTest, paired_test
from ranktune.tasks.vocabulary import TASKS

from .pieces import PIECES
from .results import Result


@dataclass(frozen=True)
class Claim:
    """That `better` scores higher than `worse`, with the source and its words' sense."""

    paper: str
    says: str
    better: str
    worse: str
    few_examples: bool = False


CLAIMS = (
    Claim("Dynamic DoRA (Mao 2024)", "above LoRA on GLUE at the same parameters", "dynamic-dora", "lora"),
    Claim("IncreLoRA (Zhang 2023)", "above LoRA at the same parameters", "increlora", "lora"),
    Claim("IncreLoRA (Zhang 2023)", "above LoRA with few training examples", "increlora", "lora", few_examples=True),
    Claim("IncreLoRA (Zhang 2023)", "above AdaLoRA", "increlora", "peft-adalora"),
    Claim("DoRA (Liu 2024)", "above LoRA at about the same parameters", "dora", "lora"),
    Claim("DyLoRA (Valipour 2022)", "no clear loss against LoRA at its largest rank", "dylora", "lora"),
    Claim("MoR (Tang 2024)", "above LoRA", "mor", "lora"),
    Claim("MoR (Tang 2024)", "above DoRA", "mor", "dora"),
)
HEAD = [
    "paper",
    "says that it is",
    "comparisons",
    "same direction",
    "opposite",
    "mean difference in each, 95 % interval",
]


@dataclass(frozen=True)
class Measured:
    """One comparison as claims see it: method to score by seed; and whether it is one with few examples."""

    name: str
    scores: Mapping[str, Mapping[int, float]]
    greater_is_better: bool
    few_examples: bool = False


def of_glue(result: Result) -> Measured:
    """A piece of the GLUE benchmark."""
    scores = {method.label: method.scores for method in result.summary.methods}
    return Measured(result.piece, scores, result.summary.greater_is_better, _is_low_resource(result))


def of_sequence(name: str, found: Mapping[str, Any]) -> Measured:
    """A table of `sequence_tasks.py`: of each method the row at the largest rank, which is the one at the budget."""
    rows = sorted(found["rows"], key=lambda row: row["rank"])
    scores = {row["method"]: dict(zip(found["seeds"], row["scores"], strict=True)) for row in rows}
    direction = {metric: greater for task in TASKS.values() for metric, greater in task.metrics.items()}
    return Measured(name, scores, direction[found["metric"]])


def checked(claim: Claim, measured: Sequence[Measured]) -> list[str]:
    """The claim beside what every comparison found that has both methods: cells of `HEAD`.

    A direction is that of the mean over seeds, and clear where the paired t-test gives p < 0.05, which is where the
    95 % interval leaves out zero.
    """
    found = []
    for comparison in measured:
        if claim.few_examples and not comparison.few_examples:
            continue
        difference = _difference(claim, comparison)
        if difference is not None:
            found.append((comparison.name, difference))
    same = [d for _, d in found if d.difference.mean > 0]
    opposite = [d for _, d in found if d.difference.mean < 0]
    words = ", ".join(f"{name} {_words(d.difference)}" for name, d in found)
    return [claim.paper, claim.says, str(len(found)), _count(same), _count(opposite), words or "not measured yet"]


def _difference(claim: Claim, comparison: Measured) -> PairedTest | None:
    """By how much the claim's better method is better, on the seeds of both."""
    better, worse = (comparison.scores.get(method, {}) for method in (claim.better, claim.worse))
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return None
    high, low = (better, worse) if comparison.greater_is_better else (worse, better)
    return paired_test([high[seed] for seed in seeds], [low[seed] for seed in seeds])


def _count(differences: Sequence[PairedTest]) -> str:
    clear = sum(d.p_t is not None and d.p_t < 0.05 for d in differences)
    return f"{len(differences)} ({clear} clear)" if differences else "0"


def _words(difference: Interval) -> str:
    bounds = "" if difference.low is None else f" ({difference.low:+.4f} to {difference.high:+.4f})"
    return f"{difference.mean:+.4f}{bounds}"


def _is_low_resource(result: Result) -> bool:
    return PIECES[result.piece].part == "low-resource"
