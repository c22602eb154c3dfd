"""What the scaling study varies, one thing at a time, and what it leaves as it is meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import typer

from ranktune.errors import did_you_mean
from stepcost import options
from stepcost.models import HEAD_WIDTH

MODULES_PER_LAYER = 6  # of the encoder: query, key, value, and three dense ones; the pooler is one more


@dataclass(frozen=True)
class Setting:
    """A model, a batch and a rank: sequences of so many tokens, through so many adapted modules of a width."""

    width: int
    modules: int
    sequences: int
    tokens: int
    r: int

    @property
    def layers(self) -> int:
        """Of the encoder that has so many linear layers."""
        return (self.modules - 1) // MODULES_PER_LAYER


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Attributes:
        name: on the command line, and of its files. label: of the picture's axis, and in tables.
        field: what of a `Setting` it is. fixed: the rest. values: where it is measured, ascending.
        hooks: what is measured is not an encoder's whole step but what a controller does in it.
    """

    name: str
    label: str
    field: str
    fixed: Setting
    values: tuple[int, ...]
    hooks: bool = False

    def at(self, value: int) -> Setting:
        """The setting at one value."""
        return replace(self.fixed, **{self.field: value})

    def refuse_impossible(self) -> None:
        """Raises typer.BadParameter where no model has such a size."""
        for value in self.values:
            setting = self.at(value)
            if setting.width % HEAD_WIDTH:
                raise typer.BadParameter(f"{self.name}={value}: attention heads are 64 wide, give a multiple of 64.")
            if not self.hooks and (setting.layers < 1 or setting.modules % MODULES_PER_LAYER != 1):
                raise typer.BadParameter(
                    f"{self.name}={value}: an encoder has 6 linear layers in each of its layers and a pooler: "
                    "give 7, 13, 19 or such."
                )


_USUAL = Setting(width=768, modules=7, sequences=2, tokens=128, r=8)

AXES = {
    axis.name: axis
    for axis in (
        Axis("rank", "rank", "r", _USUAL, (8, 16, 32, 64, 128, 256)),
        Axis("width", "width of the model", "width", _USUAL, (384, 768, 1536, 4096)),
        Axis("modules", "adapted modules", "modules", replace(_USUAL, width=384), (7, 13, 25, 49)),
        Axis("length", "tokens in a sequence", "tokens", _USUAL, (64, 128, 256, 512, 1024)),
        Axis(
            "controller",
            "modules under a controller",
            "modules",
            Setting(width=768, modules=12, sequences=1, tokens=4, r=8),
            (12, 48, 192, 768),
            hooks=True,
        ),
    )
}


def miniature(axis: Axis) -> Axis:
    """The axis on a model so small, at two points so low, that the whole study takes seconds and means nothing."""
    fixed = Setting(width=64, modules=7, sequences=2, tokens=8, r=2)
    step = MODULES_PER_LAYER if axis.field == "modules" else getattr(fixed, axis.field)
    start = getattr(fixed, axis.field)
    return replace(axis, fixed=fixed, values=(start, start + step))


def chosen(names: str | None, points: Sequence[str], *, small: bool = False) -> list[Axis]:
    """Words of the command line to axes.

    Args:
        names: such as ``"rank,width"``; None is all.
        points: such as ``["rank=8,64"]``, the values to measure on that axis instead of its own.
        small: `miniature`.
    """
    axes = {name: miniature(AXES[name]) if small else AXES[name] for name in _known(names)}
    for word in points:
        name, _, values = word.partition("=")
        if name not in axes:
            raise typer.BadParameter(f"--points {word}: give AXIS=VALUES of {', '.join(axes)}, such as rank=8,64.")
        axes[name] = replace(axes[name], values=tuple(sorted(set(options.ranks(values)))))
    for axis in axes.values():
        axis.refuse_impossible()
    return list(axes.values())


def _known(names: str | None) -> list[str]:
    wanted = list(AXES) if names is None else names.split(",")
    for name in wanted:
        if name not in AXES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(AXES)}.{did_you_mean(name, AXES)}")
    return [name for name in AXES if name in wanted]
