"""What finding a good rank costs: one DyLoRA run, or one LoRA run for each rank that might be good.

    RANKTUNE_DATA=path/to/data python benchmarks/rank_search.py shakespeare
    RANKTUNE_DATA=path/to/data python benchmarks/rank_search.py g2p --ranks 1,2,4,8 --seeds 0

DyLoRA's paper calls it "4 to 7 times faster than LoRA". That is a statement about this search and no other: the number
of runs that one run replaces. A step of DyLoRA takes about as long as one of LoRA, and if the rank is known there is
nothing to gain. Measured here, on the task of one of `examples/`, for every rank b of a list whose largest is R:

- LoRA trained at rank b, one run each;
- DyLoRA trained once at the powers of two up to R (as published, "frozen"; and with update "all"), then cut at b;
- LoRA trained at rank R, its first b components kept, and its best approximation of rank b by truncated SVD.

All have the same steps, data and lora_alpha. Learning rates come from the study of `sequence_tasks.py`, chosen per
arm on validation examples that are split off the training ones; for all LoRA runs at the middle rank of the list.
Scores are of examples that chose nothing. The cost is the runs' processor time, with their scoring before and after;
scoring DyLoRA at each rank comes on top. Runs are kept in `--out` and not repeated. The figures are
`OUT/TASK/rank_search.json`; copied to `results/rank_search/TASK.json` they are part of `docs/results.md`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from ranktune.adapters import updates
from ranktune.evaluation import rebuilt
from ranktune.rank_curve import rank_curve
from ranktune.recompression import singular_form
from ranktune.report.style import BLUE, GREEN, GREY, ORANGE, dress, new_figure, save
from ranktune.run.atomic import write_json
from ranktune.run.display import SilentDisplay
from ranktune.training import train
from ranktune.update import LowRankUpdate
from sequence_tasks import SETTINGS, Case, Study, best_rate, spread
from stepcost.machine import Machine

ALPHA = 16.0

console = Console()


@dataclass(frozen=True)
class Arm:
    """One way to have a model at every rank.

    Attributes:
        name: in the results. label: in table and picture. colour, line: in the picture.
        variant: its name in the study.
    """

    name: str
    label: str
    colour: str
    line: str
    variant: str


SEPARATE = Arm("lora", "LoRA, trained at each rank", BLUE, "-", "lora")
NESTED = (
    Arm("dylora-frozen", "DyLoRA, one run", ORANGE, "-", "dylora"),
    Arm("dylora-all", "DyLoRA, update all, one run", GREEN, "-", "dylora-all"),
)
CUT = Arm("lora-cut", "LoRA of the largest rank, cut", GREY, "--", "lora")
SVD = Arm("lora-svd", "the same, by truncated SVD", GREY, ":", "lora")
ARMS = (SEPARATE, *NESTED, CUT, SVD)


class Search:
    """The runs of one task, each done once, and their scores."""

    def __init__(self, study: Study, ranks: Sequence[int]) -> None:
        self.study = study
        self.ranks = ranks
        self.folder = study.out / "rank-search"

    def run(self, arm: Arm, case: Case) -> tuple[Path, dict[str, Any]]:
        """The directory and the metrics of a finished run, from a new one if there is none."""
        output = self.folder / f"{case.split}-{arm.name}-r{case.rank}-lr{case.learning_rate:g}-seed{case.seed}"
        record = output / "cost.json"
        if not record.exists():
            words = (f"method.lora_alpha={ALPHA}", f"output={output}")
            began = time.process_time()
            metrics = train(self.study.recipe(case, *words), self.study.file, SilentDisplay(), overwrite=True)
            write_json(record, metrics | {"cpu_seconds": time.process_time() - began})
            console.print(f"{output.name}: {metrics['metric']} {metrics['after']}")
        return output, json.loads(record.read_text(encoding="utf-8"))

    def best_learning_rate(self, arm: Arm, rank: int, seed: int) -> float:
        """The learning rate with the best score on the validation examples."""
        return best_rate(
            lambda rate: self.run(arm, Case(arm.variant, rank, rate, seed, "validation"))[1],
            self.study.setting.learning_rates,
        )

    def scores(self, arm: Arm, case: Case) -> dict[str, dict[int, float]]:
        """Arm name to the score at each rank, of all that one run of a nested arm or of the largest LoRA gives."""
        output, metrics = self.run(arm, case)
        file = output / f"scored-at-{'-'.join(map(str, self.ranks))}.json"
        if not file.exists():
            if arm in NESTED:
                curve = rank_curve(output, SilentDisplay(), ",".join(map(str, self.ranks)))
                found = {arm.name: {point.rank: curve.value(point) for point in curve.points}}
            else:
                found = {way.name: self._cut_scores(output, metrics["metric"], cut) for way, cut in _CUTS}
            write_json(file, {name: {str(b): score for b, score in curve.items()} for name, curve in found.items()})
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {name: {int(b): score for b, score in curve.items()} for name, curve in saved.items()}

    def _cut_scores(self, output: Path, metric: str, cut: Callable[[LowRankUpdate, int], None]) -> dict[int, float]:
        with rebuilt(output, SilentDisplay()) as scorer:
            adapter = [update for _, update in updates(scorer.model)]
            scores = {}
            for b in self.ranks:
                with _restored_after(adapter):
                    for update in adapter:
                        cut(update, b)
                    scores[b] = scorer.scores()[metric]
        return scores


def _keep_first(update: LowRankUpdate, b: int) -> None:
    update.lora_B[:, b:] = 0.0


def _keep_best(update: LowRankUpdate, b: int) -> None:
    A, B = singular_form(update.lora_A, update.lora_B).factors(b)
    update.lora_A[: len(A)], update.lora_B[:, : len(A)] = A, B
    update.lora_B[:, len(A) :] = 0.0


_CUTS = ((CUT, _keep_first), (SVD, _keep_best))


@contextmanager
def _restored_after(adapter: Sequence[LowRankUpdate]) -> Iterator[None]:
    """Factors changed inside the ``with`` are put back after it."""
    before = [(parameter, parameter.detach().clone()) for update in adapter for parameter in update.parameters()]
    with torch.no_grad():
        yield
        for parameter, value in before:
            parameter.copy_(value)


def search(study: Study, ranks: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Everything the table needs, as plain data."""
    found = Search(study, ranks)
    largest, middle = ranks[-1], ranks[len(ranks) // 2]
    rates = {SEPARATE.name: found.best_learning_rate(SEPARATE, middle, seeds[0])}
    rates |= {arm.name: found.best_learning_rate(arm, largest, seeds[0]) for arm in NESTED}
    scores: dict[str, dict[int, list[float]]] = {arm.name: {b: [] for b in ranks} for arm in ARMS}
    cost: dict[str, list[float]] = {arm.name: [] for arm in (SEPARATE, *NESTED)}
    for seed in seeds:
        spent = 0.0
        for b in ranks:
            case = Case("lora", b, rates[SEPARATE.name], seed, "test")
            _, metrics = found.run(SEPARATE, case)
            scores[SEPARATE.name][b].append(metrics["after"])
            spent += metrics["cpu_seconds"]
        cost[SEPARATE.name].append(spent)
        whole = Case("lora", largest, rates[SEPARATE.name], seed, "test")
        curves = found.scores(SEPARATE, whole)
        for arm in NESTED:
            case = Case(arm.variant, largest, rates[arm.name], seed, "test")
            cost[arm.name].append(found.run(arm, case)[1]["cpu_seconds"])
            curves |= found.scores(arm, case)
        for name, curve in curves.items():
            for b, score in curve.items():
                scores[name][b].append(score)
    _, metrics = found.run(SEPARATE, whole)
    facts = {name: metrics[name] for name in ("metric", "before", "steps")} | {"data": metrics["data"]["description"]}
    environment = Machine().describe()
    return facts | {
        "environment": environment,
        "seeds": list(seeds),
        "learning_rates": rates,
        "scores": scores,
        "cpu_seconds": cost,
    }


def table(result: dict[str, Any]) -> Table:
    """One row a rank, one column an arm: mean and standard deviation over the seeds."""
    made = Table(title=f"{result['metric']}, {result['before']:.4f} before training, {len(result['seeds'])} seeds")
    made.add_column("rank", justify="right")
    for arm in ARMS:
        made.add_column(arm.label, justify="right")
    for b in result["scores"][SEPARATE.name]:
        made.add_row(str(b), *(spread(result["scores"][arm.name][b]) for arm in ARMS))
    return made


def draw(result: dict[str, Any], path: Path) -> None:
    """Score against rank, a line an arm, every seed a dot."""
    figure, axes = new_figure(8.0, 5.0)
    for arm in ARMS:
        curve = result["scores"][arm.name]
        ranks = list(curve)
        axes.plot(ranks, [statistics.mean(curve[b]) for b in ranks], arm.line, color=arm.colour, label=arm.label)
        for b in ranks:
            axes.plot([b] * len(curve[b]), curve[b], ".", color=arm.colour, markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    dress(axes, result["data"], "rank", result["metric"].replace("_", " "))
    axes.legend(frameon=False)
    save(figure, path)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(SETTINGS)}.")] = "shakespeare",
    ranks: Annotated[str, typer.Option(help="The ranks to choose from, ascending.")] = "1,2,4,8,16,32",
    seeds: Annotated[str, typer.Option(help="Seeds; learning rates are chosen with the first.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("runs/sequence"),
) -> None:
    """Run what is missing of the search, print its table and what each way to search costs."""
    if task not in SETTINGS:
        raise typer.BadParameter(f"{task!r} is not one of {', '.join(SETTINGS)}.")
    study = Study(task, out.absolute())
    result = search(study, [int(word) for word in ranks.split(",")], [int(word) for word in seeds.split(",")])
    folder = study.out
    write_json(folder / "rank_search.json", result)
    draw(result, folder / "rank_search.png")
    console.print(table(result))
    console.print(f"learning rates: {result['learning_rates']}")
    searched = statistics.mean(result["cpu_seconds"][SEPARATE.name])
    for arm in NESTED:
        once = statistics.mean(result["cpu_seconds"][arm.name])
        console.print(
            f"{arm.label}: {once:.0f} s of processor time, where {len(ranks.split(','))} LoRA runs took "
            f"{searched:.0f} s: {searched / once:.1f} times as much"
        )
    console.print(f"written: {folder / 'rank_search.json'}, {folder / 'rank_search.png'}")


if __name__ == "__main__":
    typer.run(main)
