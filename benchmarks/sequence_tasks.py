"""Real results on the two sequence tasks of `examples/`: methods at equal parameters, over several seeds.

    RANKTUNE_DATA=path/to/data python benchmarks/sequence_tasks.py g2p
    RANKTUNE_DATA=path/to/data python benchmarks/sequence_tasks.py shakespeare --methods lora,dora --seeds 0,1

Every run is what `ranktune train` does with the example's recipe, made shorter. The budget is what LoRA has at
`--rank`; every other method gets the largest rank with at most as many parameters (and one percent). A method's
learning rate is the best on a validation part split off the training examples, with the first seed, of a grid that goes
on in either direction while that helps; then every seed is scored on the recipe's evaluation examples, which nothing
was chosen on. DyLoRA is trained once and scored at every rank; LoRA's lower ranks (`--lora-ranks`) are trained at the
rate of its highest. Each run leaves one JSON file in `--out`; the runs that are there are not repeated, so a study can
be stopped and taken up again. The table is `OUT/TASK/table.json`; copied to `results/sequence/TASK.json` it is part of
`docs/results.md`.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset

from ranktune.rank_curve import rank_curve
from ranktune.recipe import Recipe, load_recipe
from ranktune.run.atomic import write_folder, write_json
from ranktune.run.display import SilentDisplay
from ranktune.tasks import load_data
from ranktune.tasks.quiet import quiet_datasets
from ranktune.tasks.splits import sample, split_off
from ranktune.training import rehearse, train
from stepcost.machine import Machine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
VALIDATION_SHARE = 0.1
SLACK = 1.01  # how much more than the budget is still equal
_MOST_RATES = 6


@dataclass(frozen=True)
class Setting:
    """How a task is made short enough for many runs: its examples, overrides, and the learning rates to choose from."""

    train_examples: int
    scored_examples: int
    overrides: tuple[str, ...]
    learning_rates: tuple[float, ...]


SETTINGS = {
    "g2p": Setting(12_800, 600, ("train.epochs=2", "train.batch_size=64"), (3e-3, 1e-2)),
    "shakespeare": Setting(1000, 150, ("train.epochs=2", "train.batch_size=4"), (1e-3, 3e-3)),
}
# Name of a row -> the method, and what else is set. DyLoRA's ranks are powers of two, up to the budget's.
VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": ("method.name=lora",),
    "dora": ("method.name=dora",),
    "dylora": ("method.name=dylora",),
    "dylora-all": ("method.name=dylora", "method.update=all"),
    "mor": ("method.name=mor",),
}
COMMON = ("train.eval_every=never", "train.save_every=never", "train.logging_steps=50")


@dataclass(frozen=True)
class Case:
    """One run: a variant at a rank, a learning rate and a seed, scored on `split` ("validation" or "test")."""

    variant: str
    rank: int
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.variant}-r{self.rank}-lr{self.learning_rate:g}-seed{self.seed}"


class Study:
    """One task: its splits as files, and the runs on them, each done once."""

    def __init__(self, task: str, out: Path) -> None:
        self.setting = SETTINGS[task]
        self.file = EXAMPLES / f"{task}.yaml"
        self.out = out / task

    @cached_property
    def data(self) -> dict[str, Path]:
        """Folders of examples: to choose on, `train` and `validation`; to report, `train` and `test`."""
        folders = {split: self.out / "data" / split for split in ("validation", "test")}
        if all(folder.is_dir() for folder in folders.values()):
            return folders
        recipe = load_recipe(self.file).data
        loaded = load_data(recipe.model_copy(update={"max_train_examples": None, "max_eval_examples": None}), seed=0)
        text = next(role for role in ("source_text", "text") if role in loaded.train.column_names)
        kept, held_out = split_off(list(loaded.train[text]), VALIDATION_SHARE)
        some, few = self.setting.train_examples, self.setting.scored_examples
        examples = sample(loaded.train.select(kept), some, seed=0)
        scored = {
            "validation": sample(loaded.train.select(held_out), few, 0),
            "test": sample(loaded.evaluation, few, 0),
        }
        with quiet_datasets():
            for split, folder in folders.items():
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_folder(folder, partial(_write_splits, examples, scored[split]))
        return folders

    def recipe(self, case: Case, *more: str) -> Recipe:
        """The example's recipe, with what the case changes, and further words."""
        folder = self.data[case.split]
        overrides = (
            *self.setting.overrides,
            *COMMON,
            f"data.source={folder}",
            "data.columns={}",
            "data.replace={}",
            "data.max_eval_examples=null",
            *VARIANTS[case.variant],
            *([f"method.ranks={_powers_of_two(case.rank)}"] if case.variant.startswith("dylora") else []),
            f"method.r={case.rank}",
            f"method.lora_alpha={2 * case.rank}",
            f"train.learning_rate={case.learning_rate}",
            f"train.seed={case.seed}",
            f"output={self.out / 'runs' / case.name}",
            *more,
        )
        return load_recipe(self.file, overrides)

    def result(self, case: Case) -> dict[str, Any]:
        """The metrics of a case, from its file or from a new run."""
        file = self.out / f"{case.name}.json"
        if not file.exists():
            recipe = self.recipe(case)
            began = time.process_time()
            metrics = train(recipe, self.file, SilentDisplay(), overwrite=True)
            metrics["cpu_seconds"] = time.process_time() - began
            metrics["points"] = _points(metrics, Path(recipe.output), case)
            shutil.rmtree(recipe.output)
            write_json(file, metrics)
            scores = f"{metrics['metric']} {metrics['before']:.4f} -> {metrics['after']:.4f}"
            typer.echo(f"{case.name}: {scores} ({metrics['cpu_seconds']:.0f} s of processor time)", err=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def largest_rank(self, variant: str, rank: int) -> int:
        """The largest rank of a variant with at most the parameters that LoRA has at `rank`."""
        budget = SLACK * self._parameters("lora", rank)
        return next(r for r in range(rank, 0, -1) if self._parameters(variant, r) <= budget)

    def _parameters(self, variant: str, rank: int) -> int:
        return rehearse(self.recipe(Case(variant, rank, 1e-3, 0, "validation")), self.file).adapter

    def best_learning_rate(self, variant: str, rank: int, seed: int) -> float:
        """The learning rate with the best score on the validation examples."""
        return best_rate(
            lambda rate: self.result(Case(variant, rank, rate, seed, "validation")), self.setting.learning_rates
        )


def _write_splits(train: Dataset, evaluation: Dataset, folder: Path) -> None:
    train.to_json(folder / "train.jsonl", force_ascii=False)
    evaluation.to_json(folder / "evaluation.jsonl", force_ascii=False)


def best_rate(trained: Callable[[float], dict[str, Any]], grid: Sequence[float]) -> float:
    """The learning rate whose run scores best, of a grid that goes on at an end while the best is there.

    Args:
        trained: learning rate to the metrics of its run.
        grid: the rates to begin with, ascending.
    """
    losses: dict[float, float] = {}
    rates = list(grid)
    while rates:
        for rate in rates:
            metrics = trained(rate)
            # A run whose score is not finite has null there.
            sign = -1.0 if metrics["greater_is_better"] else 1.0
            losses[rate] = math.inf if metrics["after"] is None else sign * metrics["after"]
        best = min(losses, key=losses.__getitem__)
        beyond = {min(losses): best / 3, max(losses): best * 3}
        rates = [float(f"{beyond[best]:.1g}")] if best in beyond and len(losses) < _MOST_RATES else []
    return best


def _points(metrics: dict[str, Any], output: Path, case: Case) -> list[dict[str, Any]]:
    """Rank, parameters and score of a run, at every rank that one training gave."""
    if case.split == "validation" or not case.variant.startswith("dylora"):
        return [{"rank": case.rank, "parameters": metrics["active_params"], "score": metrics["after"]}]
    curve = rank_curve(output, SilentDisplay())
    return [{"rank": p.rank, "parameters": p.parameters, "score": curve.value(p)} for p in curve.points]


def _powers_of_two(rank: int) -> list[int]:
    return [*(2**power for power in range(rank.bit_length()) if 2**power < rank), rank]


def spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation, as text."""
    deviation = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.4f}{deviation}"


@dataclass(frozen=True)
class Row:
    """One line of the table: what one way of training scored at a rank, a score for each seed."""

    method: str
    rank: int
    parameters: int
    learning_rate: float
    scores: list[float]

    def cells(self) -> list[str]:
        """As text: method, rank, parameters, learning rate, mean and standard deviation, every seed."""
        every = ", ".join(f"{score:.4f}" for score in self.scores)
        rank, parameters, rate = str(self.rank), f"{self.parameters:,}", f"{self.learning_rate:g}"
        return [self.method, rank, parameters, rate, spread(self.scores), every]


HEAD = ["method", "rank", "parameters", "learning rate", "mean ± sd", "each seed"]


def rows(study: Study, variant: str, rank: int, rate: float, seeds: Sequence[int]) -> list[Row]:
    """Lines of the table, one a rank that was scored."""
    results = [study.result(Case(variant, rank, rate, seed, "test")) for seed in seeds]
    return [
        Row(variant, points[0]["rank"], points[0]["parameters"], rate, [point["score"] for point in points])
        for points in zip(*(result["points"] for result in results), strict=True)
    ]


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SETTINGS)}.")],
    methods: Annotated[str, typer.Option(help="Variants, with commas between them.")] = ",".join(VARIANTS),
    rank: Annotated[int, typer.Option(help="The rank of LoRA that sets the budget.")] = 16,
    lora_ranks: Annotated[str, typer.Option(help="Further ranks to train LoRA at, for comparison.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds; the learning rate is chosen with the first.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("runs/sequence"),
) -> None:
    """Run what is missing of a study and print its table."""
    if task not in SETTINGS:
        raise typer.BadParameter(f"{task!r} is not one of {', '.join(SETTINGS)}.")
    for variant in (chosen := methods.split(",")):
        if variant not in VARIANTS:
            raise typer.BadParameter(f"{variant!r} is not one of {', '.join(VARIANTS)}.")
    study = Study(task, out.absolute())
    numbers = [int(seed) for seed in seeds.split(",")]
    table: list[Row] = []
    for variant in chosen:
        r = study.largest_rank(variant, rank)
        rate = study.best_learning_rate(variant, r, numbers[0])
        table += rows(study, variant, r, rate, numbers)
        if variant == "lora":
            for smaller in (int(word) for word in lora_ranks.split(",") if word):
                table += rows(study, variant, smaller, rate, numbers)
    first = study.result(Case(table[0].method, table[0].rank, table[0].learning_rate, numbers[0], "test"))
    facts = {name: first[name] for name in ("metric", "before", "steps")} | {"data": first["data"]["description"]}
    environment = Machine().describe()
    write_json(
        study.out / "table.json",
        {"environment": environment, **facts, "seeds": numbers, "rows": [asdict(row) for row in table]},
    )
    typer.echo(f"{facts['data']}; {facts['metric']} {facts['before']:.4f} before\n")
    for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in table)):
        typer.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
