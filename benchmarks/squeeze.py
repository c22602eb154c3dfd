"""A trained LoRA recompressed: our `squeeze` beside PEFT's own way, `save_as_lora` (a dense SVD of every module).

    python benchmarks/squeeze.py                                    # one layer, 1024, 2048 and 4096 wide
    python benchmarks/squeeze.py --run runs/shakespeare --rank 8    # and the adapter of a run of `ranktune train`

Both read an adapter and write a folder of LoRA. PEFT's needs the model with the adapter on it, which is loaded before
the clock starts; ours reads the adapter's folder, inside the clock. Each is one fresh process with one thread: the
time is its processor time, which other jobs on the machine disturb least, the memory how far its resident memory rises
above what it had (Linux tells; PEFT's has the model besides). Errors are of dense float64 matrices made from the
files: the share of the updates' Frobenius norm that is lost, all modules together.

Ranks: PEFT gives every module the same one. Ours is run twice, once with as many components in all, wherever they
hold most energy, and once with just as many parameters.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import peft
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ranktune.adapter_file import adapter_folder, read_adapter
from ranktune.run.atomic import write_json
from ranktune.saved_adapter import load_saved_adapter
from ranktune.squeezing import squeeze
from ranktune.verification.opening import open_trained

console = Console(width=120)


@dataclass(frozen=True)
class Case:
    """An adapter. Of a synthetic one the model is a single linear layer of this width; of a real one, the run's."""

    name: str
    adapter: Path
    run: Path | None
    width: int


@dataclass(frozen=True)
class Measured:
    """One way on one case: seconds of processor time, MiB of memory above what was there, share of the norm lost."""

    case: str
    way: str
    total_rank: int
    parameters: int
    seconds: float
    memory: float
    error: float


def synthetic(folder: Path, width: int, rank: int) -> Case:
    """A LoRA of stock PEFT on one layer, its singular values falling by a power law as trained ones do."""
    generator = torch.Generator().manual_seed(width)
    model = peft.get_peft_model(one_layer(width), peft.LoraConfig(r=rank, target_modules=["layer"]))
    layer = model.base_model.model.layer
    with torch.no_grad():
        for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            factor.copy_(torch.randn(factor.shape, generator=generator) / width**0.5)
        layer.lora_B["default"].weight.mul_(torch.arange(1, rank + 1) ** -0.7)
    model.save_pretrained(str(folder))
    return Case(f"one layer, {width} wide, r = {rank}", folder, None, width)


def one_layer(width: int) -> nn.Module:
    """A model of one linear layer."""
    model = nn.Module()
    model.layer = nn.Linear(width, width, bias=False)
    model.config = {"model_type": "custom"}
    return model


def load(case: Case) -> nn.Module:
    """The model with its adapter on it."""
    if case.run is not None:
        return open_trained(case.run).model
    return peft.PeftModel.from_pretrained(one_layer(case.width), str(case.adapter))


def timed(case: Case, way: str, budget: int, out: Path) -> tuple[float, float]:
    """Do it in this process; seconds and MiB."""
    torch.set_num_threads(1)
    model = load(case) if way == "PEFT" else None
    work: Callable[[], object]
    if model is not None:
        work = lambda: peft.save_as_lora(out, model, rank=budget)  # noqa: E731
    elif way == "ours, equal rank":
        work = lambda: squeeze(case.adapter, out, total_rank=budget)  # noqa: E731
    else:
        work = lambda: squeeze(case.adapter, out, target_params=budget)  # noqa: E731
    before = reset_peak()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: "there is typically no need" to convert a LoRA
        work()
    return time.process_time() - start, (resident("VmHWM") - before) / 1024


def reset_peak() -> int:
    """Let the peak of this process's resident memory begin anew; what it is now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """A line of ``/proc/self/status``, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise SystemExit(f"this system does not tell {field}: the benchmark needs Linux.")


@torch.no_grad()
def dense_updates(folder: Path) -> dict[str, Tensor]:
    """Every module's update [out, in] in float64."""
    modules = load_saved_adapter(read_adapter(folder)).modules
    plain = {name: module.plain() for name, module in modules.items()}
    return {name: module.B.double() @ module.A.double() for name, module in plain.items()}


def measure(case: Case, rank: int, rounds: int, scratch: Path) -> list[Measured]:
    """All three ways, round after round."""
    before = dense_updates(case.adapter)
    budgets = {
        "PEFT": rank,
        "ours, equal rank": rank * len(before),
        "ours, equal parameters": rank * sum(sum(delta.shape) for delta in before.values()),
    }
    context = multiprocessing.get_context("spawn")
    figures: dict[str, list[tuple[float, float]]] = {way: [] for way in budgets}
    for number in range(rounds):
        for way, budget in budgets.items():
            with context.Pool(1) as pool:
                figures[way].append(pool.apply(timed, (case, way, budget, scratch / f"{case.width}-{number}-{way}")))
    results = []
    for way in budgets:
        after = load_saved_adapter(read_adapter(scratch / f"{case.width}-0-{way}")).modules
        small = dense_updates(scratch / f"{case.width}-0-{way}")
        lost = sum(float((delta - small.get(name, 0.0)).square().sum()) for name, delta in before.items())
        results.append(
            Measured(
                case=case.name,
                way=way,
                total_rank=sum(module.capacity for module in after.values()),
                parameters=sum(module.capacity * sum(module.shape) for module in after.values()),
                seconds=statistics.median(seconds for seconds, _ in figures[way]),
                memory=statistics.median(memory for _, memory in figures[way]),
                error=(lost / sum(float(delta.square().sum()) for delta in before.values())) ** 0.5,
            )
        )
    return results


def table(results: list[Measured]) -> Table:
    """A row for each case and way."""
    shown = Table(title="Recompressed to a smaller LoRA")
    for heading in ("adapter", "way"):
        shown.add_column(heading)
    for heading in ("total rank", "parameters", "processor time", "memory on top", "norm lost"):
        shown.add_column(heading, justify="right")
    for row in results:
        seconds, memory = f"{row.seconds:.2f} s", f"{row.memory:.0f} MiB"
        shown.add_row(
            row.case, row.way, f"{row.total_rank:,}", f"{row.parameters:,}", seconds, memory, f"{row.error:.4%}"
        )
    return shown


def main(
    widths: Annotated[str, typer.Option(help="Of the synthetic layers; empty for none.")] = "1024,2048,4096",
    run: Annotated[Path | None, typer.Option(help="A finished run of `ranktune train` with a fixed rank.")] = None,
    rank: Annotated[int, typer.Option(help="What every module gets; the synthetic ones start at four times it.")] = 8,
    rounds: Annotated[int, typer.Option(help="Fresh processes for each way; medians are shown.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON with all of it.")] = None,
) -> None:
    """Measure and print."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cases = [synthetic(scratch / width, int(width), 4 * rank) for width in widths.split(",") if width]
        if run is not None:
            cases.append(Case(str(run), adapter_folder(run), run, 0))
        for case in cases:
            results += measure(case, rank, rounds, scratch)
    console.print(table(results))
    if out is not None:
        write_json(
            out, {"versions": {"torch": torch.__version__, "peft": peft.__version__}, "rows": [*map(asdict, results)]}
        )


if __name__ == "__main__":
    typer.run(main)
