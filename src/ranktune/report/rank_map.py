"""The rank heat map: one row per kind of module, one column per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ranktune.report.style import SEQUENTIAL, new_figure, put_title

# Above this many cells, numbers in them would no longer be readable.
_NUMBERED_CELLS = 600
_LABELLED_ROWS = 60
_LABELLED_COLUMNS = 48
_NO_LAYER = "none"


@dataclass(frozen=True)
class RankGrid:
    """Ranks [rows, columns], nan where a layer has no such module; the last column may be for modules in no layer."""

    rows: list[str]
    columns: list[str]
    ranks: np.ndarray


def rank_grid(ranks: Mapping[str, int]) -> RankGrid:
    """Arrange module names like `bert.encoder.layer.3.attention.self.query` by layer (3) and kind (the rest).

    A model with several stacks of layers (encoder and decoder) gets the stack's name in front of the kind.
    """
    places = {name: _place(name) for name in ranks}
    stacks = {stack for stack, layer, _ in places.values() if layer is not None}
    short = _distinct_ends(stacks)
    cells: dict[tuple[str, int | None], int] = {}
    for name, (stack, layer, kind) in places.items():
        row = f"{short[stack]} {kind}".strip() if layer is not None and len(stacks) > 1 else kind
        cells[row, layer] = ranks[name]
    rows = list(dict.fromkeys(row for row, _ in cells))
    # Rows of modules in no layer come last, next to their own column.
    rows.sort(key=lambda row: (row, None) in cells)
    layers = sorted({layer for _, layer in cells if layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(layer is None for _, layer in cells) else [])]
    grid = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows], dtype=float)
    return RankGrid(rows, [_NO_LAYER if column is None else str(column) for column in columns], grid)


def rank_map_figure(ranks: Mapping[str, int], title: str) -> Figure:
    """Draw the ranks; darker is higher, grey means that a layer has no such module."""
    grid = rank_grid(ranks)
    height, width = grid.ranks.shape
    figure, axes = new_figure(min(3.6 + 0.42 * width, 24), min(1.7 + 0.32 * height, 24))
    highest = max(1.0, float(np.nanmax(grid.ranks))) if grid.ranks.size else 1.0
    axes.set_facecolor("#EDEDED")
    image = axes.imshow(np.ma.masked_invalid(grid.ranks), cmap=SEQUENTIAL, vmin=0, vmax=highest * 1.15, aspect="auto")
    _ticks(axes, grid)
    if grid.ranks.size <= _NUMBERED_CELLS:
        _numbers(axes, grid.ranks, highest)
    put_title(axes, title)
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, label="rank", boundaries=np.linspace(0, highest, 256), pad=0.02)
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.update_ticks()
    return figure


def _place(name: str) -> tuple[str, int | None, str]:
    """(stack, layer, kind): the first number in the name is the layer, what is before it the stack."""
    found = re.match(r"(?P<stack>.*?)\.?(?<![^.])(?P<layer>\d+)\.(?P<kind>.+)$", name)
    if found is None:
        return "", None, name
    return found["stack"], int(found["layer"]), found["kind"]


def _distinct_ends(stacks: set[str]) -> dict[str, str]:
    """The one part by which each stack differs from the others (`encoder`, `decoder`), or its whole name."""
    split = {stack: stack.split(".") for stack in stacks}
    for depth in range(max(map(len, split.values()), default=0)):
        parts = {stack: words[depth] if depth < len(words) else "" for stack, words in split.items()}
        if len(set(parts.values())) == len(stacks):
            return parts
    return {stack: stack for stack in stacks}


def _ticks(axes: Axes, grid: RankGrid) -> None:
    for axis, labels, most in ((axes.xaxis, grid.columns, _LABELLED_COLUMNS), (axes.yaxis, grid.rows, _LABELLED_ROWS)):
        every = -(-len(labels) // most) or 1
        axis.set_ticks(range(0, len(labels), every), labels[::every])
    axes.tick_params(length=0, labelsize=9)
    axes.set_xticks(np.arange(-0.5, len(grid.columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(grid.rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _numbers(axes: Axes, ranks: np.ndarray, highest: float) -> None:
    for (row, column), rank in np.ndenumerate(ranks):
        if not np.isnan(rank):
            color = "white" if rank > 0.6 * highest else "black"
            axes.text(column, row, f"{rank:.0f}", ha="center", va="center", fontsize=8, color=color)
