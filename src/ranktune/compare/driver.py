"""`ranktune compare` as a function: lay the grid out, get every run trained by whoever is free, and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ranktune.compare.budget import fit, reference_budget, residual_words
from ranktune.compare.grid import Grid, Run
from ranktune.compare.methods import Variant
from ranktune.compare.progress import result_line, seconds_left
from ranktune.compare.record import failed
from ranktune.compare.store import Store
from ranktune.compare.workers import Died, Ended, News, Progress
from ranktune.errors import ConfigError, RecipeError
from ranktune.recipe import Recipe
from ranktune.recipe.choices import method_config
from ranktune.run.display import clock
from ranktune.run.model import skeleton
from ranktune.run.prepare import Prepared, plan_of, prepare, prepare_examples
from ranktune.run.session import libraries_quiet
from ranktune.run.targets import Plan, check_targets

# How long to wait before a run that another process has is looked at again.
_ELSEWHERE_SECONDS = 5.0
_TICK_SECONDS = 1.0

# Fields by which a method has another size, or another scale in some modules, than r and lora_alpha say.
_OWN_BUDGETS = ("target_params", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Options:
    """What `ranktune compare` is asked for beside the recipe.

    Attributes:
        methods: the methods, in the order of the report.
        seeds: how many final runs each gets; seeds count up from the recipe's.
        out: the folder of the comparison.
        search: whether each method's learning rate is searched; else it is the recipe's times the method's factor.
        search_seeds: over how many seeds a learning rate is judged.
        validation: share of the training examples that the search scores on.
    """

    methods: Sequence[Variant]
    seeds: int
    out: Path
    search: bool = True
    search_seeds: int = 1
    validation: float = 0.1


class Pool(Protocol):
    """Whoever trains: processes of this machine, or a cluster."""

    @property
    def running(self) -> Sequence[Run]: ...
    @property
    def free(self) -> int: ...
    def start(self, run: Run) -> None: ...
    def news(self, seconds: float) -> Any: ...


class Watcher(Protocol):
    """What is told how the grid goes."""

    def say(self, line: str) -> None: ...
    def at(self, done: float, total: int, words: str) -> None: ...


def lay_out(recipe: Recipe, file: Path, options: Options) -> Grid:
    """Divide the parameter budget, check every method against model, data and number of steps, and name the runs.

    Raises:
        RecipeError, DataError, ConfigError: something cannot work; nothing was written.
    """
    if recipe.train.early_stopping_patience is not None:
        raise RecipeError(
            f"{file}: train.early_stopping_patience stops runs by their evaluation scores, which a comparison must not "
            "look at before its end. Set it to null."
        )
    if recipe.data.validation_fraction is not None:
        raise RecipeError(f"{file}: data.validation_fraction is the comparison's own (--validation); remove it.")
    for field in _OWN_BUDGETS:
        if recipe.method.get(field):
            raise RecipeError(
                f"{file}: 'method.{field}' gives its method a size of its own, and a comparison gives all methods as "
                f"many parameters as lora has at the recipe's r. Set r instead, or give it to one method: --methods "
                f'"{recipe.method["name"]}[{field}=...]".'
            )
    with libraries_quiet():
        held_out = {"validation_fraction": options.validation if options.search else None}
        prepared = prepare(recipe.model_copy(update={"data": recipe.data.model_copy(update=held_out)}), file)
        # The search has the fewest steps, so what fits there fits the final runs too.
        steps = prepare_examples(prepared).steps
        planner = _planner(prepared, str(file))
        budget = reference_budget(recipe.method, planner, str(file))
        shares = []
        for variant in options.methods:
            place = f"--methods {variant.label}" if variant.fields else str(file)
            share = fit(variant, recipe.method, budget, planner, place)
            config = method_config(share.method, place, prepared.task.peft_task_type)
            try:
                with _warnings_of(variant):
                    config.policy(planner(share.method).layout, steps.total)
            except ConfigError as error:
                raise ConfigError(
                    f"{variant.label}: {error} The runs have {steps.total:,} optimizer steps ({steps.arithmetic})."
                ) from error
            shares.append((variant, share))
    first = recipe.train.seed
    return Grid(
        recipe=recipe,
        shares=tuple(shares),
        seeds=tuple(range(first, first + options.seeds)),
        search_seeds=tuple(range(first, first + options.search_seeds)) if options.search else (),
        validation=options.validation,
        budget=budget,
        runs=options.out.absolute() / "runs",
    )


@contextmanager
def _warnings_of(variant: Variant) -> Iterator[None]:
    """Put the method's name before what it warns of: among ten methods nobody could tell whose warning it is."""

    def name(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"{variant.label}: {record.getMessage()}", ()
        return True

    logger = logging.getLogger("ranktune")
    logger.addFilter(name)
    try:
        yield
    finally:
        logger.removeFilter(name)


def compare(grid: Grid, pool_of: Callable[[Store], AbstractContextManager[Pool]], watcher: Watcher) -> None:
    """Get every run of the grid recorded, together with any other process that works on the same folder.

    Raises:
        RecipeError: the folder holds runs of other settings.
        KeyboardInterrupt: what was finished stays, and the same command goes on from there.
    """
    store = Store(grid.runs)
    store.start()
    records_of(grid, store)
    watcher.say(f"{grid.budget:,} adapter parameters each, as many as lora has at r={grid.recipe.method.get('r', 8)}:")
    for line in residual_words((variant.label, share) for variant, share in grid.shares):
        watcher.say(f"  {line}")
    with pool_of(store) as pool:
        try:
            _work(grid, store, pool, watcher)
        except KeyboardInterrupt:
            for run in pool.running:
                store.forgive(run)
            raise


def records_of(grid: Grid, store: Store) -> dict[str, dict[str, Any]]:
    """Every record in the folder, once it is known that those of the grid's runs were made with its settings.

    Raises:
        RecipeError: one was not, or is none.
    """
    records = store.records()
    _refuse_others(store, grid.wanted(records), records, known=())
    return records


def _refuse_others(
    store: Store, wanted: Sequence[Run], records: Mapping[str, Mapping[str, Any]], known: Collection[str]
) -> None:
    """Check the records of the wanted runs that are not known yet."""
    for run in wanted:
        if run.id in records and run.id not in known:
            store.refuse_others(run, records[run.id])


def _work(grid: Grid, store: Store, pool: Pool, watcher: Watcher) -> None:
    elsewhere: dict[str, float] = {}
    fractions: dict[str, float] = {}
    known: set[str] = set()
    while True:
        records = store.records()
        wanted = grid.wanted(records)
        # Another process may have been started here with other settings, when neither had a record yet.
        _refuse_others(store, wanted, records, known)
        known = set(records)
        missing = [run for run in wanted if run.id not in records]
        if not missing:
            return
        busy, now = {run.id for run in pool.running}, time.monotonic()
        for run in missing:
            if pool.free and run.id not in busy and elsewhere.get(run.id, 0.0) <= now:
                pool.start(run)
        _show(grid, records, fractions, pool, watcher)
        for news in _next_news(pool):
            if isinstance(news, Progress):
                fractions[news.run.id] = news.step / max(news.total, 1)
                continue
            fractions.pop(news.run.id, None)
            if isinstance(news, Ended) and not news.trained:
                elsewhere[news.run.id] = time.monotonic() + _ELSEWHERE_SECONDS
                continue
            if isinstance(news, Died):
                with store.claim(news.run) as mine:
                    if mine:  # it has no record, and no other process trains it again already
                        store.write(news.run, failed(news.run, news.reason, 0.0))
            _announce(news.run, grid, store, pool, watcher)


def _next_news(pool: Pool) -> Sequence[News]:
    if not pool.running:
        time.sleep(_TICK_SECONDS)  # all that is left is in other processes' hands
        return []
    return list(pool.news(_TICK_SECONDS))


def _show(
    grid: Grid,
    records: Mapping[str, Any],
    fractions: Mapping[str, float],
    pool: Pool,
    watcher: Watcher,
) -> None:
    foreseen = grid.foreseen(records)
    done = sum(run.id in records for run in foreseen) + sum(fractions.values())
    words = ", ".join(f"{run.label} lr {run.rate:g} seed {run.seed}" for run in pool.running)
    left = seconds_left(foreseen, records, fractions, len(pool.running) + pool.free)
    watcher.at(done, len(foreseen), words + ("" if left is None else f"; about {clock(left)} left"))


def _announce(run: Run, grid: Grid, store: Store, pool: Pool, watcher: Watcher) -> None:
    records = store.records()
    if run.id not in records:
        return
    foreseen = grid.foreseen(records)
    done = sum(other.id in records for other in foreseen)
    left = seconds_left(foreseen, records, {}, len(pool.running) + pool.free)
    watcher.say(result_line(run, records[run.id], done, len(foreseen), left))


def _planner(prepared: Prepared, file: str) -> Callable[[dict[str, Any]], Plan]:
    """Counts what a method section would train of the prepared model."""

    def count(section: dict[str, Any]) -> Plan:
        config = method_config(section, file, prepared.task.peft_task_type)
        model = skeleton(prepared.source, prepared.task, prepared.data)
        check_targets(config, model)
        return plan_of(config, model)

    return count
