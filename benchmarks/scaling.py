"""How the cost of a training step grows: with rank, width, number of adapted modules and sequence length.

One thing is varied while the rest stays as it is:

    rank        r, on a layer of a BERT-like encoder, 768 wide, with two
                sequences of 128 tokens
    width       of that encoder, at r = 8
    modules     adapted linear layers of an encoder 384 wide: six in each
                of its layers, and the pooler
    length      tokens in a sequence, at r = 8 and 768 wide
    controller  adapted linear layers; what moving their ranks takes of a
                step: the hooks around the optimizer's own step

Time is measured as step_cost.py does it: models with random weights,
variants over shared frozen weights that take turns in shuffled rounds,
ratios to stock PEFT LoRA formed within a round, medians and quartiles.
Memory is an exact count of what training keeps besides the frozen weights:
what backward needs of the batch, the trained parameters, their gradients
and AdamW's moments. Controllers are beside PEFT's AdaLoRA, whose
update_and_allocate has to be called by hand.

Every point is a file in OUT/points and is not measured again on the same
machine with the same versions and options, so a study can be stopped and
taken up again; after a change of the code, say --fresh. OUT/AXIS.json and
OUT/AXIS.png are a sweep; copied to benchmarks/results/scaling/, AXIS.json
is part of docs/results.md.

Examples, the first of which takes some ten minutes on an idle core:

    python benchmarks/scaling.py
    python benchmarks/scaling.py --axes rank,width --methods lora,dora
    python benchmarks/scaling.py --axes rank --points rank=8,512
    python benchmarks/scaling.py --part memory  # on a busy machine too
    python benchmarks/scaling.py --miniature    # seconds, means nothing
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ranktune.report.style import save
from ranktune.run.atomic import write_json
from stepcost import options
from stepcost.cases import time_case
from stepcost.machine import Clock, Machine, Precision, is_busy
from stepcost.models import encoder
from stepcost.variants import Variant
from sweeps.axes import AXES, Axis, Setting, chosen
from sweeps.chart import sweep_figure
from sweeps.hooks import CONTROLLED, hook_case
from sweeps.memory import memory_case
from sweeps.points import Point, Points
from sweeps.tables import Panel, table, told

USUAL = "lora,dora,peft-dora,dynamic-dora,increlora,increlora-scored,mor,dylora,peft-adalora"
console = Console()


class Part(str, Enum):
    """What to measure."""

    all = "all"
    time = "time"
    memory = "memory"


@dataclass(frozen=True)
class Study:
    """What is the same on every axis."""

    variants: list[Variant]
    machine: Machine
    rounds: int
    warmup: int

    def parts(self, axis: Axis) -> dict[str, tuple[dict[str, Any], Callable[[Setting], Sequence[Any]]]]:
        """Part of a sweep to how it is asked, and to what measures it at one setting."""
        timing = {"rounds": self.rounds, "warmup": self.warmup, "clock": self.machine.clock.value}
        timing["threads"] = torch.get_num_threads()
        if axis.hooks:
            controlled = [variant for variant in CONTROLLED if variant in self.variants]
            return {"hooks": (timing | _names(controlled), lambda setting: self._hooks(controlled, setting))}
        names = _names(self.variants)
        return {"time": (timing | names, self._time), "memory": (names, self._memory)}

    def _time(self, setting: Setting) -> Sequence[Any]:
        shape = (setting.sequences, setting.tokens)
        return time_case(
            self._encoder(setting),
            self.variants,
            shape,
            setting.r,
            0.0,
            self.machine,
            rounds=self.rounds,
            warmup=self.warmup,
        )

    def _memory(self, setting: Setting) -> Sequence[Any]:
        return memory_case(self._encoder(setting), self.variants, setting, self.machine)

    def _hooks(self, variants: Sequence[Variant], setting: Setting) -> Sequence[Any]:
        return hook_case(variants, setting, self.machine, rounds=self.rounds, warmup=self.warmup)

    def _encoder(self, setting: Setting) -> Any:
        torch.manual_seed(0)
        model = encoder(setting.width, setting.layers, setting.tokens)
        return model.to(self.machine.device, self.machine.dtype)


def _names(variants: Sequence[Variant]) -> dict[str, Any]:
    return {"variants": [variant.name for variant in variants]}


def sweep(axis: Axis, study: Study, points: Points, part: Part) -> dict[str, Any]:
    """Measure what is missing of one axis. Parts that were not asked for are added where they are complete."""
    record: dict[str, Any] = {
        "axis": axis.name,
        "label": axis.label,
        "field": axis.field,
        "fixed": {name: value for name, value in asdict(axis.fixed).items() if name != axis.field},
        "values": list(axis.values),
        "settings": asdict(study.machine) | {"rounds": study.rounds, "warmup": study.warmup},
    }
    for name, (how, measure) in study.parts(axis).items():
        found = []
        for value in axis.values:
            setting = axis.at(value)
            question = {"setting": asdict(setting), "precision": study.machine.precision.value, **how}
            point = Point(axis.name, value, name, question)
            if part is Part.all or (part is Part.memory) == (name == "memory"):
                with console.status(f"{axis.name} = {value}: {name}"):
                    found.append(points.measured(point, partial(measure, setting)))
            else:
                found.append(points.kept(point))
        if all(found):
            rows = [row for point in found for row in point["rows"]]
            newest = max((point["environment"] for point in found), key=lambda environment: environment["date"])
            record[name] = {"environment": newest, "rows": rows}
    return record


def main(
    axes: Annotated[str | None, typer.Option(help=f"Of {', '.join(AXES)}; all by default.", show_default=False)] = None,
    points: Annotated[
        list[str] | None,
        typer.Option(help="AXIS=VALUES, where to measure instead: rank=8,64. Once for each axis.", show_default=False),
    ] = None,
    methods: Annotated[str, typer.Option(help="Variants of step_cost.py, beside frozen and peft-lora.")] = USUAL,
    part: Annotated[Part, typer.Option(help="memory: exact counts; time: the rest.")] = Part.all,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds of each point.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them that do not count.")] = 1,
    device: Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="bf16: base in bfloat16, forward under autocast.")] = Precision.fp32,
    clock: Annotated[
        Clock | None,
        typer.Option(help="cpu: processor time of one thread; wall. Default: cpu, on a GPU wall.", show_default=False),
    ] = None,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="A tiny model, two points an axis: to see it work.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure points again that are in OUT already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for points, figures and pictures.")] = Path("runs/scaling"),
) -> None:
    """Measure how a training step's time and memory, and a controller's time, grow."""
    asked = chosen(axes, points or [], small=miniature)
    timed, _ = options.methods(methods)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: this machine has no usable CUDA device.")
    machine = Machine(device, dtype, clock or (Clock.wall if device.startswith("cuda") else Clock.cpu))
    if machine.clock is Clock.cpu:
        if machine.is_cuda:
            raise typer.BadParameter("--clock cpu: processor time says nothing of a GPU.")
        torch.set_num_threads(1)
    if part is not Part.memory and not machine.is_cuda and is_busy():
        console.print("[bold]This machine is busy: even processor times are longer than on an idle one.[/bold]")
    # PEFT 0.21 asks transformers 5 for an attribute that has a new name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    study = Study(timed, machine, rounds, warmup)
    kept = Points(out, machine, fresh=fresh)
    out.mkdir(parents=True, exist_ok=True)
    for axis in asked:
        record = sweep(axis, study, kept, part)
        if not (panels := told(record)):
            continue
        for panel in panels:
            console.print(_shown(record, panel))
        write_json(out / f"{axis.name}.json", record)
        save(sweep_figure(record), out / f"{axis.name}.png")
        console.print(f"written: {out / axis.name}.json, {out / axis.name}.png")


def _shown(record: dict[str, Any], panel: Panel) -> Table:
    head, rows = table(record, panel, quartiles=False)
    shown = Table(*head, title=f"\n{panel.title}, {panel.unit}", title_justify="left", box=SIMPLE)
    for row in rows:
        shown.add_row(*row)
    return shown


if __name__ == "__main__":
    # With the text above, which says more than a line of help can.
    command = typer.Typer(add_completion=False)
    command.command(help=__doc__)(main)
    command()
