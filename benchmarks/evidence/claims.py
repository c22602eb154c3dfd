"""What the papers say of their methods, and whether the results on file point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranktune.compare.summary import MethodSummary

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
    Claim("IncreLoRA (Zhang 2023)", "most so with little data", "increlora", "lora", few_examples=True),
    Claim("IncreLoRA (Zhang 2023)", "above AdaLoRA", "increlora", "peft-adalora"),
    Claim("DoRA (Liu 2024)", "above LoRA at about the same parameters", "dora", "lora"),
    Claim("DyLoRA (Valipour 2022)", "no clear loss against LoRA at its largest rank", "dylora", "lora"),
    Claim("MoR (Tang 2024)", "above LoRA", "mor", "lora"),
    Claim("MoR (Tang 2024)", "above DoRA", "mor", "dora"),
)
HEAD = ["paper", "says that it is", "comparisons", "same direction", "opposite", "mean difference in each"]


def checked(claim: Claim, results: Sequence[Result]) -> list[str]:
    """The claim beside what every comparison found that has both methods: cells of `HEAD`.

    A direction counts as one only by the sign of the mean over seeds; how sure it is stands in the piece's own tables.
    """
    found = []
    for result in results:
        methods = {method.label: method for method in result.summary.methods}
        better, worse = methods.get(claim.better), methods.get(claim.worse)
        if better is None or worse is None or (claim.few_examples and not _is_low_resource(result)):
            continue
        difference = _difference(better, worse, result.summary.greater_is_better)
        if difference is not None:
            found.append((result.piece, difference))
    same, opposite = sum(d > 0 for _, d in found), sum(d < 0 for _, d in found)
    words = ", ".join(f"{piece} {difference:+.4f}" for piece, difference in found)
    return [claim.paper, claim.says, str(len(found)), str(same), str(opposite), words or "not measured yet"]


def _difference(better: MethodSummary, worse: MethodSummary, greater: bool) -> float | None:
    seeds = sorted(better.scores.keys() & worse.scores.keys())
    if not seeds:
        return None
    mean = sum(better.scores[seed] - worse.scores[seed] for seed in seeds) / len(seeds)
    return mean if greater else -mean


def _is_low_resource(result: Result) -> bool:
    return PIECES[result.piece].part == "low-resource"
