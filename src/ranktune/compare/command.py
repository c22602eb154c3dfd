"""What the `compare` command does with its options: choose who trains, show progress, write the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ranktune.compare.driver import Options, Pool, Watcher, compare, lay_out, records_of
from ranktune.compare.ray_pool import RayPool, load_ray
from ranktune.compare.store import Store
from ranktune.compare.summary import Summary, summarise
from ranktune.compare.workers import Workers
from ranktune.errors import RecipeError
from ranktune.recipe import Recipe
from ranktune.run.directory import unwritable


def compare_recipe(
    recipe: Recipe,
    file: Path,
    options: Options,
    console: Console | None,
    *,
    jobs: int = 1,
    on_ray: bool = False,
    retry_failed: bool = False,
    report_only: bool = False,
) -> tuple[Summary, list[Path]]:
    """Train what is missing of a comparison and write its report.

    Args:
        console: where progress is shown; None shows nothing.
        jobs: runs at a time on this machine. on_ray: train on a Ray cluster instead.
        retry_failed: forget the records of failed runs first.
        report_only: train nothing, and report what is there.

    Returns:
        The figures, and the files of the report.

    Raises:
        RecipeError, DataError, ConfigError: something cannot work; nothing was trained.
    """
    from ranktune.report.comparison import write_report

    if recipe.method.get("init_from") is not None:
        raise RecipeError(
            f"{file}: 'method.init_from' keeps the ranks of an adapter, and a comparison gives all methods as many "
            "parameters as lora has at one r. Compare without it, or train each method from the adapter."
        )
    for place in (options.out, options.out / "runs"):
        if (nearest := unwritable(place)) is not None:
            raise RecipeError(f"--out: {place} cannot be written: {nearest} is not a folder you may write in.")
    if report_only:
        grid = lay_out(recipe, file, options)
        store = Store(grid.runs)
        if not (records := records_of(grid, store)):
            raise RecipeError(f"--report-only: no run has ended in {grid.runs}, so there is nothing to report.")
        summary = summarise(grid, records)
        return summary, write_report(options.out, summary, store)
    pool_of = _pool(jobs, on_ray)
    grid = lay_out(recipe, file, options)
    store = Store(grid.runs)
    with watching(console) as watcher:
        if retry_failed and grid.runs.is_dir():
            watcher.say(f"{store.forget_failures()} failed runs will be trained again")
        compare(grid, pool_of, watcher)
    summary = summarise(grid, store.records())
    return summary, write_report(options.out, summary, store)


def _pool(jobs: int, on_ray: bool) -> Callable[[Store], AbstractContextManager[Pool]]:
    if not on_ray:
        return lambda store: Workers(store, jobs)
    ray = load_ray()
    return lambda store: RayPool(store, ray)


@contextmanager
def watching(console: Console | None) -> Iterator[Watcher]:
    """A bar over the whole grid on a terminal, lines elsewhere, nothing without a console."""
    if console is None:
        yield _Silent()
    elif not console.is_terminal:
        yield _Lines(console)
    else:
        with Progress(
            TextColumn("runs"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[words]}", markup=False),  # a[b=1] is no markup
            TimeElapsedColumn(),
            console=console,
            transient=True,
            expand=True,
        ) as bar:
            yield _Bar(bar)


class _Silent:
    def say(self, line: str) -> None:
        """Nothing."""

    def at(self, done: float, total: int, words: str) -> None:
        """Nothing."""


class _Lines(_Silent):
    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Print the line whole, however long."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("runs", total=None, words="getting ready")

    def say(self, line: str) -> None:
        """Print above the bar."""
        self._bar.console.print(line, markup=False, highlight=False)

    def at(self, done: float, total: int, words: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, total=total, words=f"{done:.1f}/{total}  {words}")
