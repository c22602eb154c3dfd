"""How a mor adapter's experts are used: the load of each in every module, and the routers over the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ranktune.report.style import BLUE, GREY, SEQUENTIAL, dress, new_figure, put_title

Event = dict[str, Any]

_LABELLED_ROWS = 80
# Above this many cells, numbers in them would no longer be readable.
_NUMBERED_CELLS = 600


def expert_use_figure(routers: Event, title: str) -> Figure:
    """One row per module, one column per expert: its mean gate in percent, as the ``routers`` event has it."""
    modules = list(routers["modules"])
    load = 100 * np.array([routers["modules"][module]["load"] for module in modules])
    count, experts = load.shape
    figure, axes = new_figure(min(5.0 + 0.5 * experts, 24), min(1.8 + 0.22 * count, 24))
    image = axes.imshow(load, cmap=SEQUENTIAL, vmin=0, vmax=1.15 * load.max(), aspect="auto")
    every = -(-count // _LABELLED_ROWS) or 1
    axes.set_yticks(range(0, count, every), modules[::every], fontsize=7)
    axes.set_xticks(range(experts), [str(expert + 1) for expert in range(experts)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if load.size <= _NUMBERED_CELLS:
        for (row, column), share in np.ndenumerate(load):
            color = "white" if share > 0.6 * load.max() else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("expert")
    put_title(axes, title)
    bar = figure.colorbar(
        image, ax=axes, label="load (mean gate, %)", boundaries=np.linspace(0, load.max(), 256), pad=0.02
    )
    bar.locator = MaxNLocator(nbins=6)
    bar.update_ticks()
    return figure


def router_entropy_figure(routers: Sequence[Event], title: str) -> Figure:
    """The mean entropy of the gates over the run's ``routers`` events, and the range over modules."""
    steps = [event["step"] for event in routers]
    entropy = [[module["entropy"] for module in event["modules"].values()] for event in routers]
    figure, axes = new_figure(7.2, 4.2)
    lowest, highest = [min(row) for row in entropy], [max(row) for row in entropy]
    axes.fill_between(steps, lowest, highest, color=GREY, alpha=0.3, linewidth=0, label="lowest to highest module")
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, [sum(row) / len(row) for row in entropy], color=BLUE, marker=marker, label="mean over modules")
    dress(axes, title, "optimizer step", "entropy of the gates (1: all experts alike)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, loc="lower left")
    return figure
