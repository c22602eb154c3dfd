"""Tables for the terminal: what a recipe would adapt, and what a run achieved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from ranktune.evaluation import Evaluation
    from ranktune.run.targets import Plan


def plan_table(plan: Plan) -> Table:
    """Every module a recipe would adapt, and the totals."""
    table = Table(title="Modules to adapt", title_justify="left", show_footer=True)
    table.add_column("module", footer=f"{len(plan.modules)} modules", overflow="fold")
    table.add_column("weight (out x in)", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", footer=f"{plan.rank:,}")
    roomy = plan.start != plan.adapter
    if roomy:
        table.add_column("parameters at the start", justify="right", footer=f"{plan.start:,}")
    heading = "with room to grow" if roomy else "parameters"
    table.add_column(heading, justify="right", footer=f"{plan.adapter:,}")
    for module in plan.modules:
        sizes = [f"{module.start:,}"] if roomy else []
        shape = f"{module.shape[0]} x {module.shape[1]}"
        table.add_row(module.name, shape, str(module.rank), *sizes, f"{module.parameters:,}")
    share = plan.trainable / plan.total
    table.caption = (
        f"{plan.trainable:,} trainable parameters ({plan.adapter:,} in the adapter, {plan.other:,} in a new head and "
        f"other modules trained in full), {share:.2%} of the model's {plan.total:,}. Nothing was trained or written."
    )
    if roomy:
        table.caption += (
            f"\nThe adapter starts at total rank {plan.rank:,} with {plan.start:,} parameters; the optimizer holds "
            f"{plan.adapter:,}, with the room to grow in, and what was not grown into is dropped at the end."
        )
    if plan.end:
        table.caption += f"\nIts ranks are moved to {plan.end} at the end."
    if plan.compared:
        sizes = ", ".join(f"{name} {count:,} ({plan.adapter / count:.3g} x)" for name, count in plan.compared.items())
        table.caption += f"\nThe adapter's {plan.adapter:,} beside others of the same ranks: {sizes}."
    if plan.quantised:
        table.caption += f"\n{plan.quantised}."
    if plan.left_out:
        table.caption += f"\n{plan.left_out}"
    table.caption_justify = "left"
    return table


def summary_table(metrics: dict[str, Any]) -> Table:
    """What a run achieved and what it cost, from its `metrics.json`."""
    table = Table(
        show_header=False, title=f"{metrics['method']} on {Path(metrics['model']).name}", title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(justify="right")
    metric = str(metrics["metric"]).replace("_", " ")
    table.add_row(f"{metric} before", number(metrics["before"]))
    table.add_row(f"{metric} after", number(metrics["after"]))
    trainable = metrics["trainable_params"]
    table.add_row("trainable parameters", f"{trainable:,}")
    table.add_row("  of them active in the adapter", f"{metrics['active_params']:,}")
    table.add_row("share of the model", f"{trainable / metrics['total_params']:.2%}")
    table.add_row("total rank", f"{metrics['total_rank']:,}")
    table.add_row("training time", f"{metrics['seconds']:.1f} s, {metrics['samples_per_second']:,.0f} samples/s")
    place = "on the GPU" if metrics["peak_memory_kind"] == "cuda" else "of the process"
    table.add_row("peak memory", f"{metrics['peak_memory_mb']:,.0f} MiB {place}")
    table.add_row("adapter file", size(metrics["adapter_bytes"]))
    return table


def scores_table(result: Evaluation) -> Table:
    """Every score of an evaluation; the run's own beside it, where there is one to compare with."""
    table = Table(title_justify="left")
    table.add_column("score")
    table.add_column("now" if result.adapter is None else f"with {result.adapter}", justify="right")
    if result.recorded is not None:
        table.add_column("after training", justify="right")
    for name, value in result.scores.items():
        cells = [name.replace("_", " "), number(value)]
        if result.recorded is not None:
            cells.append(number(result.recorded.get(name)))
        table.add_row(*cells, style="bold" if name == result.metric else None)
    return table


def number(value: float | None) -> str:
    """Four decimals, or a dash for a score that is not finite."""
    return "-" if value is None else f"{value:.4f}"


def size(count: int) -> str:
    """Bytes as KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
