"""Tell a path that does not exist from a name on the hub, and say what is there instead."""

from __future__ import annotations

import os
from pathlib import Path

from ranktune.errors import did_you_mean


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a path.

    It is absolute, relative with a dot, or deeper than a hub name.
    """
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def missing(path: Path) -> str:
    """Return a sentence saying that `path` does not exist, with the closest name beside it."""
    folder = path.parent
    if not folder.is_dir():
        return f"'{path}' does not exist, and neither does its folder."
    neighbours = sorted(entry.name for entry in folder.iterdir())
    return f"'{path}' does not exist.{did_you_mean(path.name, neighbours)}"
