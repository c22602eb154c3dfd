"""Silence the progress bars of `datasets`: the command line draws its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide progress bars inside the block, and leave the user's own setting as it was."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
