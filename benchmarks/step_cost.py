"""What an adapter costs: time of one training step, and bytes kept for backward, beside stock PEFT.

    python benchmarks/step_cost.py                                     # the default comparison, on the CPU
    python benchmarks/step_cost.py --clock cpu                         # on a busy machine: one thread, processor time
    python benchmarks/step_cost.py --device cuda --dtype bf16 --width 4096 --compile

How time is measured: a BERT-like encoder with random weights, every linear layer of its encoder and pooler adapted, a
new head trained in full. All variants share the frozen weights and take turns, one step each per round, in an order
shuffled every round; ratios are formed within a round, and their median and quartiles are reported. "Frozen" is the
same model without an adapter: only its head is trained. The input embeddings ask for a gradient in every variant, so
backward goes through every layer of the frozen model too. The model's own dropout is off. The optimizer is fused AdamW.

How bytes are counted: see `stepcost/saved_bytes.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from ranktune.run.atomic import write_json
from stepcost import options
from stepcost.cases import BytesRow, TimeRow, bytes_case, time_case
from stepcost.chart import draw
from stepcost.machine import Clock, Machine, Precision, is_busy
from stepcost.models import LlamaBlock, encoder
from stepcost.tables import bytes_table, time_table
from stepcost.variants import Variant

BLOCK_WIDTH, BLOCK_INTERMEDIATE, BLOCK_TOKENS, BLOCK_RANK = 1024, 2816, 128, 32
BLOCK_DROPOUTS = (0.0, 0.05)

NOTES = (
    "Frozen: the same model without an adapter, only its head trained; the input embeddings ask for a gradient in "
    "every variant, so backward goes through every layer in all of them. Ratios: medians over rounds, each formed "
    "within a round. Kept for backward: every storage that autograd holds after forward, counted once, weights and "
    "input excluded; per token of a batch, and besides what does not grow with it."
)
console = Console()


class Part(str, Enum):
    """What to measure."""

    all = "all"
    time = "time"
    bytes = "bytes"


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    timed: list[Variant]
    counted: list[Variant]
    shapes: list[tuple[int, int]]
    ranks: list[int]
    width: int
    layers: int
    dropout: float
    rounds: int
    warmup: int
    compiled: bool

    def describe(self) -> dict[str, Any]:
        """The plan as plain data."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return plain | {name: [variant.name for variant in plain[name]] for name in ("timed", "counted")}


def measure_times(plan: Plan, machine: Machine) -> list[TimeRow]:
    """Time every case, showing each as it is ready."""
    longest = max(tokens for _, tokens in plan.shapes)
    base = encoder(plan.width, plan.layers, longest).to(machine.device, machine.dtype)
    cases = [(shape, r) for shape in plan.shapes for r in plan.ranks]
    rows: list[TimeRow] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=len(cases) * (plan.rounds + plan.warmup))
        for shape, r in cases:
            case = time_case(
                base,
                plan.timed,
                shape,
                r,
                plan.dropout,
                machine,
                rounds=plan.rounds,
                warmup=plan.warmup,
                compiled=plan.compiled,
                each_round=lambda: progress.advance(task),
            )
            progress.console.print(time_table(case))
            rows += case
    return rows


def measure_bytes(plan: Plan, machine: Machine) -> list[BytesRow]:
    """Count what a Llama block keeps, without and with dropout."""
    block = LlamaBlock(BLOCK_WIDTH, BLOCK_INTERMEDIATE).to(machine.device, machine.dtype)
    rows: list[BytesRow] = []
    for dropout in BLOCK_DROPOUTS:
        with console.status(f"counting bytes, dropout {dropout:g}"):
            rows += bytes_case(block, plan.counted, BLOCK_RANK, dropout, BLOCK_TOKENS, machine)
    console.print(bytes_table(rows))
    return rows


def write(folder: Path, record: dict[str, Any], times: Sequence[TimeRow], counts: Sequence[BytesRow]) -> None:
    """Write the figures and their chart."""
    folder.mkdir(parents=True, exist_ok=True)
    record |= {"time": [asdict(row) for row in times], "bytes": [asdict(row) for row in counts]}
    write_json(folder / "step_cost.json", record)
    draw(times, counts, folder / "step_cost.png")
    console.print(f"written: {folder / 'step_cost.json'}, {folder / 'step_cost.png'}")


def main(
    device: Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="bf16: base in bfloat16, forward under autocast.")] = Precision.fp32,
    width: Annotated[int, typer.Option(min=64, help="Of the encoder; a multiple of 64.")] = 768,
    layers: Annotated[int, typer.Option(min=1, help="Of the encoder.")] = 2,
    shapes: Annotated[str, typer.Option(help="Batches, SEQUENCESxTOKENS.")] = "16x128,4x512",
    ranks: Annotated[str, typer.Option(help="Ranks.")] = "8,64",
    methods: Annotated[str | None, typer.Option(help="Only these, beside frozen and peft-lora.")] = None,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Adapter dropout while timing.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 13,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them that do not count.")] = 2,
    compile_model: Annotated[bool, typer.Option("--compile", help="Time models after torch.compile.")] = False,
    clock: Annotated[Clock, typer.Option(help="cpu: processor time of one thread, for busy machines.")] = Clock.wall,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor; None: torch's choice.")] = None,
    part: Annotated[Part, typer.Option(help="Measure only one half.")] = Part.all,
    out: Annotated[Path, typer.Option(help="Folder for step_cost.json and step_cost.png.")] = Path("runs/bench"),
) -> None:
    """Time a training step and count the bytes kept for backward, with our adapters and with stock PEFT's."""
    timed, counted = options.methods(methods)
    rank_list, shape_list = options.ranks(ranks), options.shapes(shapes)
    if clock is Clock.cpu:
        if threads not in (None, 1) or torch.device(device).type != "cpu":
            raise typer.BadParameter("processor time means something for one thread on the CPU only.")
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: this machine has no usable CUDA device.")
    if width % 64:
        raise typer.BadParameter(f"--width {width}: attention heads are 64 wide, give a multiple of 64.")
    machine = Machine(device, dtype, clock)
    plan = Plan(timed, counted, shape_list, rank_list, width, layers, dropout, rounds, warmup, compile_model)
    before = machine.describe()
    if machine.clock is Clock.wall and not machine.is_cuda and is_busy():
        console.print("[bold]This machine is busy: wall times will mostly show that. Consider --clock cpu.[/bold]")
    # PEFT 0.21 asks transformers 5 for an attribute that has a new name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    torch.manual_seed(0)
    times = measure_times(plan, machine) if part is not Part.bytes else []
    counts = measure_bytes(plan, machine) if part is not Part.time else []
    console.print(NOTES)
    write(out, {"environment": before, "settings": plan.describe() | asdict(machine)}, times, counts)


if __name__ == "__main__":
    typer.run(main)
