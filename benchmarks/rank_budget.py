"""A rank for each module, or one for all? DyLoRA adapters cut to equal parameters in three ways, on real data.

    RANKTUNE_DATA=path/to/data python benchmarks/rank_budget.py shakespeare
    RANKTUNE_DATA=path/to/data python benchmarks/rank_budget.py g2p --updates frozen,all --seeds 0,1,2

One adapter with every rank from 1 to `--rank` is trained for each seed, on the task of one of `examples/` in the form
that `sequence_tasks.py` gives it; its learning rate is the best of a grid at the full rank, on validation examples.
Then it is cut to the parameters that some rank b for all modules has:

- uniform: that rank b, as published;
- energy: `ranktune truncate --by energy`, from the factors alone;
- loss: `ranktune truncate --by loss`, with the loss on validation examples.

Scores are of examples that chose nothing. Runs and scores are kept in `--out` and not repeated.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import ranktune
from ranktune.evaluation import rebuilt
from ranktune.rank_budget import ranks_by_energy, ranks_by_loss
from ranktune.rank_setting import at_rank
from ranktune.run.atomic import write_json
from ranktune.run.display import SilentDisplay
from ranktune.training import train
from sequence_tasks import SETTINGS, Case, Study

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
VARIANTS = {"frozen": "dylora", "all": "dylora-all"}
WAYS = ("uniform", "energy", "loss")

console = Console(width=200)


class Cuts:
    """The adapters of one task, each trained once, and the scores of what is cut from them."""

    def __init__(self, study: Study, rank: int, evaluations: int, examples: int) -> None:
        self.study = study
        self.rank = rank
        self.evaluations, self.examples = evaluations, examples

    def run(self, update: str, rate: float, seed: int) -> Path:
        """The output directory of a finished run, whose evaluation examples are the validation ones."""
        output = self.study.out / "rank-budget" / f"{update}-r{self.rank}-lr{rate:g}-seed{seed}"
        if not (output / "metrics.json").exists():
            case = Case(VARIANTS[update], self.rank, rate, seed, "validation")
            recipe = self.study.recipe(case, "method.ranks=null", f"output={output}")
            metrics = train(recipe, self.study.file, SilentDisplay(), overwrite=True)
            console.print(f"{output.name}: {metrics['metric']} {metrics['after']} on validation")
        return output

    def best_learning_rate(self, update: str, seed: int) -> float:
        """By the loss on the validation examples, at the full rank."""

        def loss(rate: float) -> float:
            metrics = json.loads((self.run(update, rate, seed) / "metrics.json").read_text(encoding="utf-8"))
            return metrics["scores"]["after"]["loss"]

        return min(LEARNING_RATES, key=loss)

    def scores(self, update: str, rate: float, seed: int, ranks: list[int]) -> dict[str, Any]:
        """For each budget and way: the parameters, the ranks, and the score on the test examples."""
        output = self.run(update, rate, seed)
        asked = "-".join(map(str, ranks))
        file = output / f"cuts-at-{asked}-by-{self.evaluations}-losses-of-{self.examples}.json"
        if not file.exists():
            chosen = self._chosen(output, ranks)
            found: dict[str, Any] = {}
            with rebuilt(self._on_test(output), SilentDisplay()) as scorer:
                for b, ways in chosen.items():
                    found[b] = {}
                    for way, cut in ways.items():
                        with at_rank(scorer.model, cut):
                            parameters = ranktune.active_parameters(scorer.model)
                            score = scorer.scores()[scorer.task.metric]
                        found[b][way] = {"parameters": parameters, "score": score, "ranks": cut}
                        console.print(f"{output.name}, parameters of rank {b}, {way}: {score:.4f}")
            write_json(file, found)
        return json.loads(file.read_text(encoding="utf-8"))

    def _chosen(self, output: Path, ranks: list[int]) -> dict[str, dict[str, dict[str, int]]]:
        """For each budget and way: module name to rank."""
        chosen = {}
        with rebuilt(output, SilentDisplay()) as scorer:
            model = scorer.model
            for b in ranks:
                with at_rank(model, b):
                    budget, uniform = ranktune.active_parameters(model), ranktune.ranks(model)
                by_loss = ranks_by_loss(model, budget, lambda: scorer.loss(self.examples), self.evaluations)
                chosen[str(b)] = {"uniform": uniform, "energy": ranks_by_energy(model, budget), "loss": by_loss}
            with at_rank(model, self.rank):
                chosen[str(self.rank)] = {"uniform": ranktune.ranks(model)}
        return chosen

    def _on_test(self, output: Path) -> Path:
        """A copy of the run that is scored on the test examples."""
        copy = output.with_name(f"{output.name}-on-test")
        if not copy.exists():
            shutil.copytree(output, copy, ignore=shutil.ignore_patterns("checkpoints", "*.png"))
            recipe = copy / "recipe.yaml"
            text = recipe.read_text(encoding="utf-8")
            folders = self.study.data
            recipe.write_text(text.replace(str(folders["validation"]), str(folders["test"])), encoding="utf-8")
        return copy


def lines(found: list[dict[str, Any]]) -> list[str]:
    """A row for each budget: mean, standard deviation and every seed, of each way."""
    made = []
    for b, ways in found[0].items():
        cells = []
        for way in WAYS:
            if way not in ways:
                cells.append("")
                continue
            scores = [seed[b][way]["score"] for seed in found]
            spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.4f}{spread} ({', '.join(f'{s:.4f}' for s in scores)})")
        made.append(f"| {b} | {ways['uniform']['parameters']:,} | {' | '.join(cells)} |")
    return made


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SETTINGS)}.")] = "shakespeare",
    rank: Annotated[int, typer.Option(help="The highest rank.")] = 8,
    cuts: Annotated[str, typer.Option(help="Ranks whose parameters are the budgets.")] = "2,4",
    updates: Annotated[str, typer.Option(help="frozen, all or both.")] = "frozen,all",
    seeds: Annotated[str, typer.Option(help="Seeds; the learning rate is chosen with the first.")] = "0,1,2",
    evaluations: Annotated[int, typer.Option(help="Losses measured per cut, at most.")] = 500,
    examples: Annotated[int, typer.Option(help="Examples of each such loss.")] = 100,
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("runs/sequence"),
) -> None:
    """Run what is missing and print the table."""
    if task not in SETTINGS:
        raise typer.BadParameter(f"{task!r} is not one of {', '.join(SETTINGS)}.")
    study = Study(task, out.absolute())
    found = Cuts(study, rank, evaluations, examples)
    numbers, budgets = [int(word) for word in seeds.split(",")], [int(word) for word in cuts.split(",")]
    for update in updates.split(","):
        rate = found.best_learning_rate(update, numbers[0])
        results = [found.scores(update, rate, seed, budgets) for seed in numbers]
        console.print(f"{task}, update={update}, learning rate {rate:g}", highlight=False)
        console.print(f"| budget of rank | parameters | {' | '.join(WAYS)} |\n|---|---|---|---|---|", highlight=False)
        console.print("\n".join(lines(results)), highlight=False)


if __name__ == "__main__":
    typer.run(main)
