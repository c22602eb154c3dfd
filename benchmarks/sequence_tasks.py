"""Real results on the two sequence tasks of `examples/`: methods at equal parameters, over several seeds.

    RANKTUNE_DATA=path/to/data python benchmarks/sequence_tasks.py g2p
    RANKTUNE_DATA=path/to/data python benchmarks/sequence_tasks.py shakespeare --methods lora,dora --seeds 0,1

Every run is what `ranktune train` does with the example's recipe, made shorter. The budget is what LoRA has at
`--rank`; every other method gets the largest rank with at most as many parameters (and one percent). A method's
learning rate is the best of a grid on a validation part split off the training examples, with the first seed; then
every seed is scored on the recipe's evaluation examples, which nothing was chosen on. Each run leaves one JSON file in
`--out`; the runs that are there are not repeated, so a study can be stopped and taken up again.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from ranktune.recipe import Recipe, load_recipe
from ranktune.recipe.choices import method_config
from ranktune.run.atomic import write_json
from ranktune.run.display import SilentDisplay
from ranktune.run.model import skeleton
from ranktune.run.prepare import prepare
from ranktune.run.session import libraries_quiet
from ranktune.run.targets import plan
from ranktune.tasks import load_data
from ranktune.tasks.quiet import quiet_datasets
from ranktune.tasks.splits import sample, split_off
from ranktune.training import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
VALIDATION_SHARE = 0.1
SLACK = 1.01  # how much more than the budget is still equal


@dataclass(frozen=True)
class Setting:
    """How a task is made short enough for many runs: its examples, overrides, and the learning rates to choose from."""

    train_examples: int
    scored_examples: int
    overrides: tuple[str, ...]
    learning_rates: tuple[float, ...]


SETTINGS = {
    "g2p": Setting(12_800, 1000, ("train.epochs=1", "train.batch_size=32"), (3e-3, 1e-2, 3e-2)),
    "shakespeare": Setting(1500, 200, ("train.epochs=1", "train.batch_size=4"), (1e-3, 3e-3, 1e-2)),
}
COMMON = ("train.eval_every=never", "train.save_every=never", "train.logging_steps=50")


@dataclass(frozen=True)
class Case:
    """One run: a method at a rank, a learning rate and a seed, scored on `split` ("validation" or "test")."""

    method: str
    rank: int
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.method}-r{self.rank}-lr{self.learning_rate:g}-seed{self.seed}"


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
                folder.mkdir(parents=True)
                scored[split].to_json(folder / "evaluation.jsonl", force_ascii=False)
                examples.to_json(folder / "train.jsonl", force_ascii=False)
        return folders

    def recipe(self, case: Case) -> Recipe:
        """The example's recipe, with what the case changes."""
        folder = self.data[case.split]
        overrides = (
            *self.setting.overrides,
            *COMMON,
            f"data.source={folder}",
            "data.columns={}",
            "data.replace={}",
            "data.max_eval_examples=null",
            f"method.name={case.method}",
            f"method.r={case.rank}",
            f"method.lora_alpha={2 * case.rank}",
            f"train.learning_rate={case.learning_rate}",
            f"train.seed={case.seed}",
            f"output={self.out / 'runs' / case.name}",
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
            shutil.rmtree(recipe.output)
            write_json(file, metrics)
            scores = f"{metrics['metric']} {metrics['before']:.4f} -> {metrics['after']:.4f}"
            typer.echo(f"{case.name}: {scores} ({metrics['cpu_seconds']:.0f} s of processor time)", err=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def largest_rank(self, method: str, rank: int) -> int:
        """The largest rank of a method with at most the parameters that LoRA has at `rank`."""
        with libraries_quiet():
            recipe = self.recipe(Case(method, rank, 1e-3, 0, "validation"))
            prepared = prepare(recipe, self.file)

            def parameters(name: str, r: int) -> int:
                config = method_config(
                    {**recipe.method, "name": name, "r": r} if name == method else {"name": name, "r": r, **_TARGETS},
                    str(self.file),
                    task_type=prepared.task.peft_task_type,
                )
                return plan(config, skeleton(prepared.source, prepared.task, prepared.data)).adapter

            budget = SLACK * parameters("lora", rank)
            return max(r for r in range(1, rank + 1) if parameters(method, r) <= budget)

    def best_learning_rate(self, method: str, rank: int, seed: int) -> float:
        """The learning rate of the grid with the best score on the validation examples."""
        scores = {}
        for rate in self.setting.learning_rates:
            metrics = self.result(Case(method, rank, rate, seed, "validation"))
            better = metrics["metric"] == "exact_match"
            score = metrics["after"] if metrics["after"] is not None else math.nan
            scores[rate] = -score if better else score
        return min(scores, key=lambda rate: (math.isnan(scores[rate]), scores[rate]))


_TARGETS = {"target_modules": "all-linear"}


def row(study: Study, method: str, rank: int, rate: float, seeds: Sequence[int]) -> list[str]:
    """A line of the table: the score over the seeds, mean and standard deviation."""
    results = [study.result(Case(method, rank, rate, seed, "test")) for seed in seeds]
    scores = [result["after"] for result in results]
    spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    parameters = f"{results[0]['active_params']:,}"
    return [method, str(rank), parameters, f"{rate:g}", f"{statistics.mean(scores):.4f}{spread}", _listed(scores)]


def _listed(scores: Iterable[float]) -> str:
    return ", ".join(f"{score:.4f}" for score in scores)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SETTINGS)}.")],
    methods: Annotated[str, typer.Option(help="Method names, with commas between them.")] = "lora,dora",
    rank: Annotated[int, typer.Option(help="The rank of LoRA that sets the budget.")] = 16,
    lora_ranks: Annotated[str, typer.Option(help="Further ranks to train LoRA at, for comparison.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds; the learning rate is chosen with the first.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("runs/sequence"),
) -> None:
    """Run what is missing of a study and print its table."""
    if task not in SETTINGS:
        raise typer.BadParameter(f"{task!r} is not one of {', '.join(SETTINGS)}.")
    study = Study(task, out.absolute())
    numbers = [int(seed) for seed in seeds.split(",")]
    rows = []
    for method in methods.split(","):
        r = study.largest_rank(method, rank)
        rate = study.best_learning_rate(method, r, numbers[0])
        rows.append(row(study, method, r, rate, numbers))
        if method == "lora":
            smaller = [int(word) for word in lora_ranks.split(",") if word]
            rows += [row(study, method, small, rate, numbers) for small in smaller]
    first = study.result(Case("lora", rank, study.best_learning_rate("lora", rank, numbers[0]), numbers[0], "test"))
    typer.echo(f"{first['data']['description']}; {first['metric']} {first['before']:.4f} before\n")
    typer.echo("| method | rank | parameters | learning rate | mean ± sd | each seed |\n|---|---|---|---|---|---|")
    for cells in rows:
        typer.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
