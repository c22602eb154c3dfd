"""An inspected adapter in the terminal: a layer x module grid of ranks, and a line for each module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from ranktune.report.rank_map import rank_grid
from ranktune.report.tables import size

if TYPE_CHECKING:
    from ranktune.inspection import Inspection, ModuleInspection


_MOST_MODULES, _MOST_CELLS = 4096, 20_000


def inspection_lines(found: Inspection) -> Iterator[str]:
    """What the adapter is, in a few lines."""
    yield f"{found.method} ({found.peft_type}) for {found.base_model or 'an unnamed base model'}"
    ranks = list(found.ranks.values())
    spread = f"rank {max(ranks)}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    yield f"{len(ranks)} modules, {spread}, {sum(ranks):,} in total; r {found.r}, lora_alpha {found.lora_alpha}"
    in_full = sum(math.prod(shape) for shape in found.trained_in_full.values())
    record = found.parameters - found.adapter_parameters - in_full
    parts = [f"{found.adapter_parameters:,} parameters in the adapter"]
    parts += [f"{in_full:,} trained in full beside it"] if in_full else []
    idle = any(module.rank < module.capacity for module in found.modules.values())
    parts += [f"{record:,} {'not in use, or' if idle else 'that'} record its ranks"] if record else []
    yield f"{size(found.nbytes)}: {', '.join(parts)}"
    if found.trained_in_full:
        names = ", ".join(name.removeprefix("base_model.model.") for name in found.trained_in_full)
        yield f"trained in full beside it: {names}"
    if found.history:
        first, last = found.history[0]["step"], found.history[-1]["step"]
        before = sum(ranks) - sum(change["new"] - change["old"] for change in found.history)
        changes = "1 rank change" if len(found.history) == 1 else f"{len(found.history):,} rank changes"
        moved = f"{changes} in " + (f"step {first:,}" if first == last else f"steps {first:,} to {last:,}")
        yield f"{moved}: total rank {before:,} to {sum(ranks):,}"


def rank_table(found: Inspection) -> Table | None:
    """Ranks by kind of module (rows) and layer (columns); None where the names make no grid of readable size."""
    if len(found.modules) > _MOST_MODULES:
        return None
    grid = rank_grid(found.ranks)
    if grid.ranks.size > _MOST_CELLS:
        return None
    table = Table(title="Rank of each module, by layer", title_justify="left")
    table.add_column("module", overflow="fold")
    for column in grid.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row, ranks in zip(grid.rows, grid.ranks, strict=True):
        table.add_row(row, *("" if math.isnan(rank) else f"{rank:.0f}" for rank in ranks))
    return table


def module_table(found: Inspection) -> Table:
    """Norm and energy of each module's update."""
    table = Table(title="Updates", title_justify="left")
    table.add_column("module", overflow="fold")
    for heading in ("out x in", "rank", "norm", "largest / smallest component", "rank for 90 % / 99 % of energy"):
        table.add_column(heading, justify="right")
    if any(module.nested for module in found.modules.values()):
        table.add_column("norm at ranks 1, 2, 4, ...", justify="right")
    if any(module.experts for module in found.modules.values()):
        table.add_column("norm of each expert", justify="right")
    for name, module in found.modules.items():
        table.add_row(name, f"{module.shape[0]} x {module.shape[1]}", _rank(module), *_cells(module))
    return table


def _rank(module: ModuleInspection) -> str:
    return str(module.rank) if module.rank == module.capacity else f"{module.rank} of {module.capacity}"


def _cells(module: ModuleInspection) -> list[str]:
    cells = ["", "", ""]
    if module.norm is not None:
        components = [norm for norm in module.components if norm] or [0.0]
        ends = max(components), min(components)
        energy = f"{module.rank_for(0.9)} / {module.rank_for(0.99)}"
        cells = [f"{module.norm:.3g}", f"{ends[0]:.3g} / {ends[1]:.3g}", energy]
    if module.nested is not None:
        powers = [module.nested[b - 1] for b in _powers(len(module.nested))]
        cells.append(" ".join(f"{norm:.3g}" for norm in powers))
    if module.experts is not None:
        cells.append(" ".join(f"{expert.norm:.3g}" for expert in module.experts))
    return cells


def _powers(highest: int) -> list[int]:
    """1, 2, 4, ... and the highest."""
    powers = [1 << place for place in range(highest.bit_length()) if 1 << place < highest]
    return [*powers, highest]
