"""From the records of a comparison to one summary per method: scores, intervals, tests, parameters, costs, trouble."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ranktune.compare.grid import Grid
from ranktune.compare.search import Trial, at_edge
from ranktune.compare.statistics import Interval, PairedTest, holm, paired_test, pareto_front, t_interval
from ranktune.recipe.yaml_text import write

REFERENCE = "lora"

Record = Mapping[str, Any]

# How much more than another a method may train and still be as small, on the Pareto front.
_SLACK = 1.01


@dataclass(frozen=True)
class MethodSummary:
    """One method's final runs.

    Attributes:
        label: as it was asked for. note: what it got of the budget, in words.
        rate: its learning rate, None where no rate was usable. trials: learning rate to what the search found there.
        edge: whether the best rate is the last one that was tried on its side.
        scores: seed to score of the runs that ended well. interval: of those, None where there are none.
        troubles: one line for every run that failed or diverged.
        budget, planned: adapter parameters it was given and expected to end with.
        adapter, trainable, training, total: parameters at the end in the adapter and in all that was trained, those
            trained at the start, and the model's; None where no run ended well.
        costs: means over the runs of train_time, tokens_per_second, file_size and accelerator_memory_*.
        test: against the reference on the seeds that both have, None for the reference itself or without common seeds.
        p_corrected: its t-test's p after Holm's correction over all methods.
        on_front: whether no method has at most as many parameters, to one percent, and a better score, nor fewer and
            at least its score.
        runs: names of its final runs that ended well, by seed.
        lost: seed to status of the final runs that failed or diverged.
        waiting: runs that have no record yet, as far as they are foreseen; none in a comparison that has ended.
    """

    label: str
    note: str
    rate: float | None
    trials: dict[float, Trial]
    edge: bool
    scores: dict[int, float]
    interval: Interval | None
    troubles: list[str]
    budget: int | None
    planned: int | None
    adapter: float | None
    trainable: float | None
    training: float | None
    total: float | None
    costs: dict[str, float]
    test: PairedTest | None
    p_corrected: float | None
    on_front: bool
    runs: dict[int, str]
    lost: dict[int, str] = field(default_factory=dict)
    waiting: int = 0

    @property
    def residual(self) -> float | None:
        """Adapter parameters above (below) the budget at the end."""
        return None if self.budget is None or self.adapter is None else self.adapter - self.budget


@dataclass(frozen=True)
class Summary:
    """A whole comparison.

    Attributes:
        greater_is_better: about `metric`.
        different_data: names of runs that saw other data than the rest.
        before: seed to score before training, on the evaluation data; the adapters of every method begin at nothing.
        recipe: what all runs share, as YAML.
    """

    metric: str
    greater_is_better: bool
    methods: list[MethodSummary]
    budget: int
    seeds: tuple[int, ...]
    search_seeds: int
    validation: float
    different_data: list[str]
    machine: dict[str, Any]
    packages: dict[str, Any]
    model: str
    data: str
    steps: int | None
    memory_kind: str
    before: Mapping[int, float] = field(default_factory=dict)
    recipe: str = ""

    @property
    def waiting(self) -> int:
        """Runs that have not been trained yet, as far as they are foreseen."""
        return sum(method.waiting for method in self.methods)

    @property
    def reference(self) -> MethodSummary | None:
        """The method that others are tested against, if it is among them and has scores."""
        found = (method for method in self.methods if method.label == REFERENCE and method.scores)
        return next(found, None)


_COSTS = (
    "train_time",
    "tokens_per_second",
    "file_size",
    "accelerator_memory_max",
    "accelerator_memory_reserved_avg",
    "accelerator_memory_reserved_99th",
)


def summarise(grid: Grid, records: Mapping[str, Record]) -> Summary:
    """Put the records of a grid together; runs that are missing are simply not there."""
    wanted = {run.id: run for run in grid.wanted(records)}
    own = {name: records[name] for name in wanted if name in records}
    good = [record for record in own.values() if record["train_info"]["status"] == "success"]
    some = good[-1] if good else None
    missing = Counter(run.label for run in grid.foreseen(records) if run.id not in records)
    drafts = [{**_draft(v.label, grid, own, wanted), "waiting": missing[v.label]} for v, _ in grid.shares]
    greater = True if some is None else bool(some["comparison"]["greater_is_better"])
    methods = _tested(drafts, greater)
    return Summary(
        metric="score" if some is None else some["comparison"]["metric"],
        greater_is_better=greater,
        methods=methods,
        budget=grid.budget,
        seeds=grid.seeds,
        search_seeds=len(grid.search_seeds),
        validation=grid.validation,
        different_data=_different_data(own),
        machine={} if some is None else some["meta_info"]["system_info"],
        packages={} if some is None else some["meta_info"]["package_info"],
        model="" if some is None else some["meta_info"]["model_info"]["name"],
        data="" if some is None else some["meta_info"]["dataset_info"]["description"],
        steps=None if some is None else some["train_info"]["metrics"][-1]["step"],
        memory_kind="" if some is None else some["train_info"]["memory_kind"],
        before=_before(good),
        recipe=write({key: value for key, value in grid.recipe.resolved().items() if key != "output"}),
    )


def _before(records: Sequence[Record]) -> dict[int, float]:
    own = [record["comparison"] for record in records if record["comparison"]["phase"] == "final"]
    found = {one["seed"]: one.get("before") for one in own}
    return {seed: score for seed, score in sorted(found.items()) if score is not None}


def _draft(label: str, grid: Grid, records: Mapping[str, Record], wanted: Mapping[str, Any]) -> dict[str, Any]:
    variant, share = next((v, s) for v, s in grid.shares if v.label == label)
    own = [name for name, run in wanted.items() if run.label == label]
    mine = {name: records[name] for name in own if name in records}
    finals = {name: record for name, record in mine.items() if record["comparison"]["phase"] == "final"}
    status = {name: record["train_info"]["status"] for name, record in finals.items()}
    well = {name: record for name, record in finals.items() if status[name] == "success"}
    tried = grid.trials(variant, records)
    scores = {record["comparison"]["seed"]: record["comparison"]["score"] for record in well.values()}
    rates = {run.rate for run in wanted.values() if run.label == label and run.phase == "final"}

    def average(field: str) -> float | None:
        values = [record["train_info"][field] for record in well.values() if record["train_info"][field] is not None]
        return mean(values) if values else None

    return {
        "label": label,
        "note": share.note,
        "rate": next(iter(rates), None),
        "trials": tried,
        "edge": at_edge(dict(enumerate(tried.values()))),
        "scores": dict(sorted(scores.items())),
        "interval": t_interval(list(scores.values())) if scores else None,
        "troubles": [_trouble(record) for record in mine.values() if record["train_info"]["status"] != "success"],
        "budget": share.budget,
        "planned": share.planned,
        "adapter": average("num_adapter_params"),
        "trainable": average("num_trainable_params"),
        "training": average("num_training_params"),
        "total": average("num_total_params"),
        "costs": {field: value for field in _COSTS if (value := average(field)) is not None},
        "runs": {record["comparison"]["seed"]: name for name, record in well.items()},
        "lost": {finals[name]["comparison"]["seed"]: how for name, how in status.items() if how != "success"},
    }


def _tested(drafts: list[dict[str, Any]], greater: bool) -> list[MethodSummary]:
    reference = next((draft["scores"] for draft in drafts if draft["label"] == REFERENCE), {})
    tests = []
    for draft in drafts:
        common = sorted(draft["scores"].keys() & reference.keys()) if draft["label"] != REFERENCE else []
        pairs = [(draft["scores"][seed], reference[seed]) for seed in common]
        tests.append(paired_test([own for own, _ in pairs], [other for _, other in pairs]) if pairs else None)
    corrected = holm([test.p_t if test else None for test in tests])
    placed = [draft for draft in drafts if draft["interval"] is not None]
    sign = 1.0 if greater else -1.0
    costs = _about_equal([draft["trainable"] for draft in placed])
    front = pareto_front(costs, [sign * draft["interval"].mean for draft in placed])
    best = {placed[place]["label"] for place in front}
    return [
        MethodSummary(**draft, test=test, p_corrected=p, on_front=draft["label"] in best)
        for draft, test, p in zip(drafts, tests, corrected, strict=True)
    ]


def _about_equal(counts: list[float]) -> list[float]:
    """Every number as the smallest that it exceeds by less than the slack: a few parameters fewer are no merit."""
    found: list[float] = []
    for count in sorted(counts):
        if not found or count > _SLACK * found[-1]:
            found.append(count)
    return [max(start for start in found if start <= count) for count in counts]


def _trouble(record: Record) -> str:
    own, info = record["comparison"], record["run_info"]
    last = (info["error_msg"] or "no reason was given").strip().splitlines()[-1]
    return f"{own['phase']} lr {own['learning_rate']:g} seed {own['seed']} {record['train_info']['status']}: {last}"


def _different_data(records: Mapping[str, Record]) -> list[str]:
    """Runs whose data is not that of the other runs of their phase and seed."""
    seen: dict[tuple[str, int], str] = {}
    odd = []
    for name, record in records.items():
        if record["train_info"]["status"] == "failed":
            continue
        key = record["comparison"]["phase"], record["comparison"]["seed"]
        fingerprint = record["meta_info"]["dataset_info"]["fingerprint"]
        if seen.setdefault(key, fingerprint) != fingerprint:
            odd.append(name)
    return odd
