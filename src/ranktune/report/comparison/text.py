"""The words of a report: its tables, what was done, and what the numbers can and cannot show. Also report.md itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ranktune.compare.statistics import what_seeds_can_show
from ranktune.compare.summary import MethodSummary, Summary
from ranktune.report.comparison.marks import trouble_words
from ranktune.report.tables import size

Table = tuple[list[str], list[list[str]]]

WHAT_THE_RECIPE_IS = (
    "Shared by all runs. A method takes what it knows of the section 'method'; its rank and learning rate are in the "
    "tables, and the complete recipe of every run is in its JSON."
)


def score_table(summary: Summary) -> Table:
    """Method, score with interval, every seed, learning rate."""
    metric, form = summary.metric.replace("_", " "), _form(summary)
    head = ["method", f"{metric}, mean", "95 % interval", "seeds", "every seed", "learning rate"]
    return head, [
        [
            method.label,
            "-" if method.interval is None else f"{method.interval.mean:{form}}",
            _bounds(method.interval.low, method.interval.high, form) if method.interval else "-",
            f"{len(method.scores)} of {len(summary.seeds)}"
            + (f" ({words})" if (words := trouble_words(method)) else ""),
            ", ".join(f"{score:{form}}" for score in method.scores.values()) or "-",
            "-" if method.rate is None else f"{method.rate:g}" + (" (edge)" if method.edge else ""),
        ]
        for method in summary.methods
    ]


def parameter_table(summary: Summary) -> Table:
    """What each method ended with, had while it trained, and by how much it missed the budget."""
    head = ["method", "adapter, at the end", "beside the budget", "all trained, at the end", "at the start", "how"]
    return head, [
        [
            method.label,
            _count(method.adapter),
            _residual(method),
            _count(method.trainable),
            _count(method.training),
            method.note,
        ]
        for method in summary.methods
    ]


def cost_table(summary: Summary) -> Table:
    """Time, speed, memory and file."""
    head = ["method", "training, s", "tokens/s", "memory max", "average", "99th percentile", "file"]
    return head, [
        [
            method.label,
            _number(method.costs.get("train_time"), "{:,.1f}"),
            _number(method.costs.get("tokens_per_second"), "{:,.0f}"),
            *(
                _size(method.costs.get(f"accelerator_memory_{name}"))
                for name in ("max", "reserved_avg", "reserved_99th")
            ),
            _size(method.costs.get("file_size")),
        ]
        for method in summary.methods
    ]


def test_table(summary: Summary) -> Table:
    """Every method against the reference, seed by seed."""
    form = "+" + _form(summary)
    head = ["method", "pairs", "mean difference to lora", "95 % interval", "t-test p", "p, Holm", "signed-rank p"]
    return head, [
        [
            method.label,
            str(method.test.difference.count),
            f"{method.test.difference.mean:{form}}",
            _bounds(method.test.difference.low, method.test.difference.high, form),
            _number(method.test.p_t, "{:.3g}"),
            _number(method.p_corrected, "{:.3g}"),
            _number(method.test.p_wilcoxon, "{:.3g}"),
        ]
        for method in summary.methods
        if method.test is not None
    ]


def what_was_done(summary: Summary) -> list[str]:
    """The comparison in sentences."""
    lines = [
        *unfinished(summary),
        f"{Path(summary.model).name} on {summary.data}; {summary.steps or 0:,} optimizer steps, the same data in the "
        f"same order, the same optimizer and schedule for every method at a seed.",
        *([_how_scored(summary)] if any(method.scores for method in summary.methods) else []),
        f"Every method was given {summary.budget:,} adapter parameters at its end, which is what lora has at the "
        "recipe's r; the table of parameters says by how much each one misses that, and what it trained at the start.",
    ]
    if summary.search_seeds:
        seeds = "one seed" if summary.search_seeds == 1 else f"{summary.search_seeds} seeds"
        lines.append(
            f"Learning rates were chosen with {seeds} on {summary.validation:.0%} of the training data, which the "
            "search did not train on; the evaluation data was not looked at. The grid has steps of a factor 3.16 and "
            "grows where its best point is its last; 'edge' says that it ended there all the same."
        )
    else:
        lines.append("Learning rates were not searched: each is the recipe's times a factor for the method.")
    lines.append(
        "Intervals are 95 % t-intervals over seeds: they say how well the mean over seeds is known on this evaluation "
        "data, not how the methods would do on other data. There is none of one seed, nor of seeds that score the same."
    )
    return lines


def _how_scored(summary: Summary) -> str:
    metric, direction = summary.metric.replace("_", " "), "higher" if summary.greater_is_better else "lower"
    line = f"Scored by {metric} on the evaluation data; {direction} is better."
    if not summary.before:
        return line
    before = [f"{score:{_form(summary)}}" for score in summary.before.values()]
    each = ", ".join(before) + ", seed by seed" if len(set(before)) > 1 else before[0]
    return f"{line} Before training it is {each}."


def about_costs(summary: Summary) -> str:
    """What time and memory are, and are not."""
    memory = (
        "memory is what the allocator of the GPU had reserved."
        if summary.memory_kind == "cuda"
        else "memory is the resident memory of the run's own process, libraries included, sampled after every step."
    )
    return (
        "Means over seeds, on the machine that is described with the versions and beside whatever else ran on it. Time "
        f"is that of training, without the scoring on the way; {memory}"
    )


def about_front(summary: Summary) -> str:
    """Which methods are on the Pareto front, and what that says; empty where there are no scores."""
    front = ", ".join(method.label for method in summary.methods if method.on_front)
    if not front:
        return ""
    return (
        f"On the Pareto front: {front}. No other method has at most as many trained parameters (to one percent) and a "
        "better mean, nor fewer and as good a one. Chance is not considered."
    )


def unfinished(summary: Summary) -> list[str]:
    """What is still to come, where a report is written before the end."""
    if not summary.waiting:
        return []
    return [
        f"This comparison has not ended: at least {_runs(summary.waiting)} still to be trained. The same command goes "
        "on from here."
    ]


def verdict(summary: Summary) -> list[str]:
    """What the tests say, plainly."""
    reference = summary.reference
    if reference is None:
        return ["There are no scores of plain lora, so nothing is tested against it."]
    lines = [what_seeds_can_show(len(reference.scores))]
    sign = 1 if summary.greater_is_better else -1
    found = [m for m in summary.methods if m.p_corrected is not None and m.p_corrected < 0.05 and m.test]
    for method in found:
        mean = method.test.difference.mean if method.test else 0.0
        word, by = "better" if sign * mean > 0 else "worse", f"{abs(mean):{_form(summary)}}"
        lines.append(f"{method.label} is {word} than lora by {by} (p = {method.p_corrected:.3g} after Holm).")
    if not found and any(method.p_corrected is not None for method in summary.methods):
        lines.append("No method differs significantly from lora here, after Holm's correction for their number.")
    return [*lines, *_untested(summary)]


def _untested(summary: Summary) -> list[str]:
    """Why methods with several pairs have no p."""
    tests = {method.label: method.test for method in summary.methods if method.test and method.test.p_t is None}
    several = {label: test for label, test in tests.items() if test.difference.count > 1}
    equal = [label for label, test in several.items() if test.p_wilcoxon is None]
    shifted = [label for label in several if label not in equal]
    lines = []
    if equal:
        lines.append(f"The same scores as lora's at every seed, so that there is nothing to test: {', '.join(equal)}.")
    if shifted:
        lines.append(
            "The same difference to lora at every seed, which leaves the t-test no spread to measure it by: "
            f"{', '.join(shifted)}."
        )
    return lines


def troubles(summary: Summary) -> list[str]:
    """Runs that failed or diverged, and runs that saw other data."""
    lines = [f"{method.label}: {trouble}" for method in summary.methods for trouble in method.troubles]
    lines += [
        f"{name} was trained on other data than the rest; delete its JSON and run again"
        for name in summary.different_data
    ]
    lines += [
        f"{method.label}: no learning rate was usable, so it was not compared"
        for method in summary.methods
        if method.rate is None and not method.waiting
    ]
    return lines


def markdown(summary: Summary, pictures: Sequence[str]) -> str:
    """report.md."""
    parts = ["# Comparison", *what_was_done(summary), "## Scores", markdown_table(score_table(summary))]
    parts += ["## Parameters", markdown_table(parameter_table(summary))]
    if front := about_front(summary):
        parts.append(front)
    parts += ["## Against lora", *verdict(summary)]
    tests = test_table(summary)
    parts += [markdown_table(tests)] if tests[1] else []
    parts += ["## Time and memory", about_costs(summary), markdown_table(cost_table(summary))]
    if trouble := troubles(summary):
        parts += ["## Runs that did not end well", "\n".join(f"- {line}" for line in trouble)]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
    parts += ["## Machine and versions", "\n".join(f"- {name}: {value}" for name, value in machine(summary).items())]
    parts += ["## Recipe", WHAT_THE_RECIPE_IS, f"```yaml\n{summary.recipe}```"]
    return "\n\n".join(parts) + "\n"


def machine(summary: Summary) -> dict[str, str]:
    """Machine and versions."""
    return {name: str(value) for name, value in {**summary.machine, **summary.packages}.items()}


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    head, body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _form(summary: Summary) -> str:
    """Four decimals, and more where the scores would otherwise all read the same."""
    scores = [score for method in summary.methods for score in method.scores.values()]
    spread = max(scores, default=0.0) - min(scores, default=0.0)
    return f".{min(8, max(4, 1 - math.floor(math.log10(spread)))) if spread > 0 else 4}f"


def _bounds(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _residual(method: MethodSummary) -> str:
    if method.residual is None or not method.budget:
        return "-"
    return "0" if method.residual == 0 else f"{method.residual:+,.0f} ({method.residual / method.budget:+.2%})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _size(count: float | None) -> str:
    return "-" if count is None else size(round(count))


def _runs(count: int) -> str:
    return "1 run is" if count == 1 else f"{count} runs are"
