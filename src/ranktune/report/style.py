"""The look every picture shares: colours that colour-blind readers can tell apart, and how a figure is saved."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ranktune.run.atomic import write_bytes

# From the palette of Okabe and Ito.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
# One hue from light to dark: readable with every kind of colour vision, and in grey.
SEQUENTIAL = "Blues"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` inches with one set of axes, drawn without any window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def put_title(axes: Axes, title: str) -> None:
    """A title at the left, broken into lines where the figure ends: layout makes room for lines, not for width."""
    inches = axes.get_figure(root=True).get_figwidth()  # pyright: ignore[reportOptionalMemberAccess]
    axes.set_title(textwrap.fill(title, int(10 * inches), break_on_hyphens=False), loc="left", fontsize=11)


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, axis labels, and no more lines than the reader needs."""
    put_title(axes, title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, in one step."""
    picture = io.BytesIO()
    # Without the writer's version in the file, the same run gives the same bytes.
    figure.savefig(picture, format="png", dpi=144, metadata={"Software": None})
    write_bytes(path, picture.getvalue())
