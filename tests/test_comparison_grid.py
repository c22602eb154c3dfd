"""The grid of a comparison: methods as asked for, equal parameters, which runs there are, claims, and progress."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ranktune.compare.budget import Share
from ranktune.compare.command import compare_recipe, watching
from ranktune.compare.driver import Options, compare, lay_out
from ranktune.compare.grid import Grid, Run
from ranktune.compare.methods import Variant, default_methods, parse_methods
from ranktune.compare.progress import result_line, seconds_left
from ranktune.compare.record import failed
from ranktune.compare.store import ATTEMPTS, Store
from ranktune.compare.workers import Died, Ended, Progress
from ranktune.errors import ConfigError, RecipeError
from ranktune.recipe import load_recipe
from tests.tiny import LINEAR_MODULES, WIDTH, write_everything

# Of rank 1 on the tiny model: 2 layers of (4 square, 2 of 16 x 32) and the pooler; and its output rows.
COMPONENTS = 2 * (4 * 2 * WIDTH + 2 * 3 * WIDTH) + 2 * WIDTH
ROWS = 2 * (4 * WIDTH + 3 * WIDTH) + WIDTH


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("grid"))


def grid_of(recipe: Path, out: Path, methods: str, *overrides: str, **options: Any) -> Grid:
    asked = Options(parse_methods(methods), options.pop("seeds", 2), out, **options)
    return lay_out(load_recipe(recipe, overrides), recipe, asked)


def record_of(run: Run, score: float | None, status: str = "success", seconds: float = 2.0) -> dict[str, Any]:
    record = failed(run, "", seconds)
    record["train_info"]["status"] = status
    record["comparison"] |= {"score": score, "loss": 1.0, "metric": "accuracy", "greater_is_better": True}
    costs = ("train_time", "tokens_per_second", "file_size", "memory_kind")
    memory = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    parameters = ("num_trainable_params", "num_total_params", "num_adapter_params", "num_training_params")
    record["train_info"] |= dict.fromkeys((*costs, *memory, *parameters), 1)
    record["meta_info"] |= {"model_info": {}, "dataset_info": {}, "package_info": {}}
    return record


def test_methods_are_parsed() -> None:
    variants = parse_methods("lora, dynamic-dora[dem_weight=0, init_r=12],mor[num_experts=4],dylora[ranks=[1, 2],r=2]")
    assert [(variant.name, variant.fields) for variant in variants] == [
        ("lora", {}),
        ("dynamic-dora", {"dem_weight": 0, "init_r": 12}),
        ("mor", {"num_experts": 4}),
        ("dylora", {"ranks": [1, 2], "r": 2}),
    ]
    assert variants[1].slug == "dynamic-dora-dem_weight-0-init_r-12".replace("_", "-")
    names = [variant.name for variant in default_methods()]
    assert {"lora", "dora", "dynamic-dora", "increlora", "peft-lora", "peft-dora", "peft-adalora", "full"} <= set(names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no method"),
        ("lora,lora", "twice"),
        ("lora[r=2", "not a method"),
        ("lora[r]", "not an override"),
        ("lora[a.b=1]", "one field"),
    ],
)
def test_methods_that_cannot_be_are_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_methods(text)


def test_unknown_methods_and_fields_are_refused_before_anything_is_written(recipe: Path, tmp_path: Path) -> None:
    for methods, words in (
        ("lorra", r"^--methods: unknown method 'lorra'\. Did you mean 'lora'"),
        ("lora[rr=2]", r"^--methods lora\[rr=2\]: unknown key 'method\.rr'"),
    ):
        with pytest.raises(RecipeError, match=words):
            grid_of(recipe, tmp_path / "out", methods)
    with pytest.raises(ConfigError, match=r"^--methods dynamic-dora\[beta=2\]: section 'method': beta"):
        grid_of(recipe, tmp_path / "out", "dynamic-dora[beta=2]")
    short = "dynamic-dora[warmup_ratio=0.6,final_ratio=0.3]"
    with pytest.raises(ConfigError, match=r"dynamic-dora.*: .*too short.*optimizer steps"):
        grid_of(recipe, tmp_path / "out", f"lora,{short}", "train.max_steps=1")
    with pytest.raises(RecipeError, match="early_stopping"):
        grid_of(recipe, tmp_path / "out", "lora", "train.early_stopping_patience=2")
    with pytest.raises(RecipeError, match="validation_fraction"):
        grid_of(recipe, tmp_path / "out", "lora", "data.validation_fraction=0.5")
    for method in ("name: increlora, target_params: 900", "name: dora, rank_pattern: {query: 4}"):
        with pytest.raises(RecipeError, match=r"method\.(target_params|rank_pattern)' gives .* Set r instead"):
            grid_of(recipe, tmp_path / "out", "lora,dora", f"method={{{method}}}")
    assert not (tmp_path / "out").exists()


def test_a_schedule_must_fit_into_the_search_which_is_shorter(recipe: Path, tmp_path: Path) -> None:
    late = "peft-adalora[warmup_ratio=0.5,final_ratio=0.4]"  # six steps are enough for it, two or three are not
    grid_of(recipe, tmp_path, late, "train.epochs=1", search=False)
    with pytest.raises(ConfigError, match=r"too short for AdaLoRA.* The runs have [23] optimizer steps"):
        grid_of(recipe, tmp_path, late, "train.epochs=1", validation=0.65)


def test_every_method_gets_the_same_number_of_parameters(recipe: Path, tmp_path: Path) -> None:
    methods = "lora,dora,peft-lora,peft-dora,dynamic-dora,increlora,dylora,peft-adalora,full"
    grid = grid_of(recipe, tmp_path, methods, "method.r=4", "method.lora_alpha=8", "train.epochs=5")
    budget = 4 * COMPONENTS
    assert grid.budget == budget
    shares = {variant.label: share for variant, share in grid.shares}
    for label in ("lora", "peft-lora", "dylora", "dynamic-dora", "increlora"):
        assert shares[label].planned == budget, label
        assert shares[label].at_most == (label in ("dynamic-dora", "increlora")), label
    for label in ("lora", "peft-lora", "dylora"):
        assert shares[label].method["r"] == 4
        assert shares[label].method["lora_alpha"] == 8
    for label in ("dora", "peft-dora"):
        share = shares[label]
        # Short of the budget by less than the cheapest component, in + out.
        assert share.planned is not None
        assert 0 <= budget - share.planned < 2 * WIDTH
        wider = share.method["rank_pattern"]
        assert share.method["r"] == 3
        assert set(wider.values()) == {4}
        assert share.planned == 3 * COMPONENTS + ROWS + sum(
            3 * WIDTH
            if "intermediate" in name or "r.0.output.dense" in name or "r.1.output.dense" in name
            else 2 * WIDTH
            for name in wider
        )
        # Every module keeps the recipe's scale, alpha / r = 2.
        assert share.method["lora_alpha"] == 6
        assert set(share.method["alpha_pattern"].values()) == {8}
        layers = {name.split("layer.")[1][0] for name in wider if "layer." in name}
        assert layers == {"0", "1"}  # spread over the model
    assert shares["dynamic-dora"].method["target_params"] == budget
    assert shares["full"].budget is None
    assert shares["full"].planned is None
    assert shares["peft-adalora"].planned == budget + 4 * LINEAR_MODULES  # a value of E for every component


def test_a_magnitude_comes_off_the_budget_in_parameters(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "dynamic-dora[use_dora=true]", "method.r=4", "train.epochs=5")
    share = grid.shares[0][1]
    assert share.method["target_params"] == 4 * COMPONENTS - ROWS


def test_ranks_set_by_hand_are_left_alone_and_the_scale_follows_rslora(recipe: Path, tmp_path: Path) -> None:
    overrides = ("method.r=4", "method.lora_alpha=8", "method.use_rslora=true")
    grid = grid_of(recipe, tmp_path, "lora[r=1],dora", *overrides)
    (_, by_hand), (_, dora) = grid.shares
    assert (by_hand.method["r"], by_hand.method["lora_alpha"]) == (1, 8)
    assert (by_hand.budget, by_hand.planned) == (None, COMPONENTS)
    assert "by hand" in by_hand.note
    by_size = "dynamic-dora[target_params=300],increlora[r=1],peft-adalora[r=1]"
    for _, share in grid_of(recipe, tmp_path, by_size, "train.epochs=5").shares:
        # What they begin with is no size to end with.
        assert (share.budget, share.planned, share.note) == (None, None, "its rank was set by hand")
    assert dora.method["lora_alpha"] / 3**0.5 == pytest.approx(8 / 4**0.5)


def test_a_nested_adapter_keeps_the_ranks_it_was_asked_for(recipe: Path, tmp_path: Path) -> None:
    methods = "dylora[ranks=[1,2,4]],dylora[block_size=2],dylora[min_r=3],dylora[ranks=[1,2,4],use_dora=true]"
    grid = grid_of(recipe, tmp_path, methods, "method.r=4", "method.lora_alpha=8")
    *plain, decomposed = (share for _, share in grid.shares)
    assert [share.method["ranks"] for share in plain] == [[1, 2, 4], None, None]
    for share in plain:
        assert share.method["r"] == 4
        assert share.planned == share.budget == 4 * COMPONENTS
    assert (decomposed.method["r"], decomposed.method["ranks"]) == (3, [1, 2, 3])
    assert decomposed.planned == 3 * COMPONENTS + ROWS


def test_a_budget_below_the_smallest_rank_is_missed_openly(recipe: Path, tmp_path: Path) -> None:
    share = grid_of(recipe, tmp_path, "dora", "method.r=1").shares[0][1]
    assert share.method["r"] == 1
    assert share.planned == COMPONENTS + ROWS
    assert share.budget == COMPONENTS


def test_experts_that_leave_no_room_for_a_rank_are_halved_unless_set_by_hand(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "mor,mor[num_experts=8]", "method.r=6", "train.epochs=5")
    (_, fitted), (_, by_hand) = grid.shares
    assert fitted.planned is not None
    assert by_hand.planned is not None
    assert fitted.method["num_experts"] == 4
    assert fitted.planned <= 6 * COMPONENTS < by_hand.planned
    assert "num_experts=4" in fitted.note
    assert by_hand.method["num_experts"] == 8
    own = grid_of(recipe, tmp_path, "mor", "method.name=mor", "method.r=6", "method.num_experts=8").shares[0][1]
    assert own.method["num_experts"] == 8
    tight = grid_of(recipe, tmp_path, "mor", "method.r=1", "train.epochs=5").shares[0][1]
    assert tight.method["num_experts"] == 2  # never one, which is no mixture


def test_all_methods_run_on_the_same_recipe_and_only_the_search_holds_data_out(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path / "out", "lora,dynamic-dora,full", "train.epochs=5", "train.seed=7")
    searches = grid.wanted({})
    assert {run.phase for run in searches} == {"search"}
    assert len(searches) == 9
    assert {run.recipe.data.validation_fraction for run in searches} == {0.1}
    rates = {label: [run.rate for run in searches if run.label == label] for label in ("lora", "dynamic-dora", "full")}
    assert rates["lora"] == [0.00632, 0.02, 0.0632]
    assert rates["dynamic-dora"] == [0.02, 0.0632, 0.2]
    assert rates["full"] == [0.000632, 0.002, 0.00632]
    records = {run.id: record_of(run, 0.5 if "lr0.02" in run.id or run.label != "lora" else 0.4) for run in searches}
    finals = [run for run in grid.wanted(records) if run.phase == "final"]
    assert {(run.label, run.rate, run.seed) for run in finals} == {
        ("lora", 0.02, 7), ("lora", 0.02, 8),
        ("dynamic-dora", 0.0632, 7), ("dynamic-dora", 0.0632, 8),
        ("full", 0.002, 7), ("full", 0.002, 8),
    }  # fmt: skip
    for run in finals:
        values = run.recipe.resolved()
        assert values["data"]["validation_fraction"] is None
        for name in ("learning_rate", "seed", "save_every"):
            del values["train"][name]
        reference = finals[0].recipe.resolved()
        assert values["data"] == reference["data"]
        assert values["train"] == {key: value for key, value in reference["train"].items() if key in values["train"]}
        assert run.recipe.train.save_every == "never"


def test_a_failed_rate_is_spoilt_and_a_method_without_any_is_left_out(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora,dora", search_seeds=2, seeds=1)
    records: dict[str, Any] = {}
    while missing := [run for run in grid.wanted(records) if run.id not in records]:
        for run in missing:
            diverged = run.label == "dora" or (run.rate == 0.02 and run.seed == 1)
            records[run.id] = record_of(run, None if diverged else 0.5, "diverged" if diverged else "success")
    finals = [run for run in grid.wanted(records) if run.phase == "final"]
    assert [(run.label, run.seed) for run in finals] == [("lora", 0)]
    assert finals[0].rate != 0.02
    tried = [variant for variant, _ in grid.shares if variant.label == "dora"]
    assert sorted(grid.trials(tried[0], records)) == [0.000632, 0.002, 0.00632, 0.02, 0.0632]


def test_equal_scores_are_told_apart_by_their_loss(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora", seeds=1, search_seeds=2)
    records = {run.id: record_of(run, 0.5) for run in grid.wanted({})}
    for name, record in records.items():
        # 0.9 and 0.7, 1.0 and 0.4, 1 and 1: the mean over seeds counts.
        first, second = {"0.00632": (0.9, 0.7), "0.02": (1.0, 0.4)}.get(name.split("lr")[1].split("-")[0], (1.0, 1.0))
        record["comparison"]["loss"] = second if name.endswith("seed1") else first
    assert [run.rate for run in grid.wanted(records) if run.phase == "final"] == [0.02]


def test_a_loss_is_searched_downwards(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora", seeds=1)
    searches = grid.wanted({})
    records = {run.id: record_of(run, score) for run, score in zip(searches, (3.0, 1.0, 2.0), strict=True)}
    for record in records.values():
        record["comparison"]["greater_is_better"] = False
    assert [run.rate for run in grid.wanted(records) if run.phase == "final"] == [0.02]


def test_without_a_search_the_factor_decides(recipe: Path, tmp_path: Path) -> None:
    runs = grid_of(recipe, tmp_path, "lora,full", search=False).wanted({})
    assert {(run.phase, run.label, run.rate) for run in runs} == {("final", "lora", 0.02), ("final", "full", 0.002)}


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Run:
    return grid_of(recipe, tmp_path, "lora", search=False).wanted({})[0]


def test_results_of_other_settings_are_refused_by_name(run: Run, recipe: Path, tmp_path: Path) -> None:
    store = Store(run_folder(run))
    store.start()
    store.write(run, record_of(run, 0.5))
    store.refuse_others(run, store.records()[run.id])
    other = grid_of(recipe, tmp_path, "lora", "train.batch_size=8", search=False).wanted({})[0]
    assert other.id == run.id
    with pytest.raises(RecipeError, match=r"train\.batch_size: 16 then, 8 now.*another --out"):
        store.refuse_others(other, store.records()[run.id])
    moved = replace(run, recipe=run.recipe.model_copy(update={"output": "elsewhere"}))
    assert moved.fingerprint == run.fingerprint


def test_results_of_other_settings_that_come_while_it_works_are_not_taken_for_its_own(
    recipe: Path, tmp_path: Path
) -> None:
    """Two processes, started in one empty folder: neither finds a record that would warn it."""
    ours, theirs = (grid_of(recipe, tmp_path, "lora", f"train.batch_size={size}", search=False) for size in (16, 8))

    def meanwhile(_: Run) -> float:
        other = theirs.wanted({})[1]
        Store(theirs.runs).write(other, record_of(other, 0.9))
        return 0.5

    with pytest.raises(RecipeError, match=r"train\.batch_size: 8 then, 16 now"):
        worked(ours, meanwhile)


def run_folder(run: Run) -> Path:
    return Path(run.recipe.output).parent


def _hold(folder: Path, run: Run, held: Any, release: Any) -> None:
    with Store(folder).claim(run) as mine:
        held.put(mine)
        release.wait(60)


def test_a_claim_keeps_others_out_and_falls_with_its_process(run: Run) -> None:
    store = Store(run_folder(run))
    store.start()
    context = multiprocessing.get_context("spawn")
    held, release = context.Queue(), context.Event()
    holder = context.Process(target=_hold, args=(store.folder, run, held, release))
    holder.start()
    assert held.get(timeout=120) is True
    with store.claim(run) as mine:
        assert mine is False
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    with store.claim(run) as mine:
        assert mine is True
    store.write(run, record_of(run, 0.5))
    with store.claim(run) as mine:
        assert mine is False  # it was finished between the look at the records and the lock


def test_attempts_are_counted_until_the_run_is_finished_or_forgiven(run: Run) -> None:
    store = Store(run_folder(run))
    store.start()
    assert [store.begin(run) for _ in range(ATTEMPTS + 1)] == [1, 2, 3]
    store.forgive(run)
    assert store.begin(run) == 1
    store.write(run, record_of(run, 0.5))
    assert store.begin(run) == 1


def test_failures_are_forgotten_on_request_and_damaged_records_are_named(run: Run) -> None:
    store = Store(run_folder(run))
    store.start()
    store.write(run, failed(run, "Traceback...\nValueError: no", 1.0))
    assert store.forget_failures() == 1
    assert store.records() == {}
    (store.folder / "x.json").write_text("{")
    with pytest.raises(RecipeError, match=r"x\.json is not JSON.*Delete it"):
        store.records()
    for text in ("{}", "[]", '{"comparison": {}}', '{"run_info": 3, "train_info": [], "comparison": null}'):
        (store.folder / "x.json").write_text(text)
        with pytest.raises(RecipeError, match="no record of a comparison"):
            store.records()


@pytest.mark.parametrize(
    ("status", "field"),
    [
        ("failed", "run_info.total_time"),
        ("failed", "train_info.status"),
        ("failed", "comparison.score"),
        ("success", "train_info.train_time"),
        ("success", "meta_info.dataset_info"),
        ("diverged", "comparison.metric"),
    ],
)
def test_a_record_that_lost_a_field_is_named_before_anything_is_made_of_it(run: Run, status: str, field: str) -> None:
    store = Store(run_folder(run))
    store.start()
    record = record_of(run, 0.5, status)
    store.write(run, record)
    assert store.records() == {run.id: record}
    section, name = field.split(".")
    del record[section][name]
    store.write(run, record)
    with pytest.raises(RecipeError, match=f"{run.id}.json .* has no '{field}'. Delete it"):
        store.records()


class FakePool:
    """Finishes, loses or kills runs as the test says, without training."""

    def __init__(self, store: Store, scores: Any) -> None:
        self.store, self.scores, self.running, self.started = store, scores, [], []

    free = property(lambda self: 1 - len(self.running))

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, run: Run) -> None:
        self.running.append(run)
        self.started.append(run.id)

    def news(self, seconds: float) -> Any:  # noqa: ARG002
        run = self.running.pop()
        result = self.scores(run)
        if isinstance(result, str):
            yield Died(run, result)
        elif isinstance(result, BaseException):
            self.running.append(run)
            raise result
        else:
            self.store.write(run, record_of(run, result))
            yield Ended(run, True)


class Lines:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.seen: list[tuple[float, int]] = []
        self.words: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def at(self, done: float, total: int, words: str) -> None:
        self.seen.append((done, total))
        self.words.append(words)


def worked(grid: Grid, scores: Any) -> tuple[list[str], Lines]:
    pools: list[FakePool] = []

    def pool_of(store: Store) -> FakePool:
        pools.append(FakePool(store, scores))
        return pools[-1]

    lines = Lines()
    try:
        compare(grid, pool_of, lines)
    finally:
        grid_started = pools[0].started if pools else []
    return grid_started, lines


def test_the_whole_grid_is_trained_once_and_failures_do_not_stop_it(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora,dora", seeds=2)

    def scores(run: Run) -> float | str:
        if run.label == "dora" and run.phase == "final" and run.seed == 1:
            return "Traceback (most recent call last):\nRuntimeError: out of memory"
        return {0.02: 0.6}.get(run.rate, 0.5)

    started, lines = worked(grid, scores)
    assert len(started) == len(set(started)) == 10
    records = Store(grid.runs).records()
    assert records.keys() == set(started)
    broken = [name for name, record in records.items() if record["train_info"]["status"] == "failed"]
    assert broken == ["dora-final-lr0.02-seed1"]
    assert "out of memory" in records[broken[0]]["run_info"]["error_msg"]
    assert any("dora lr 0.02 seed 1: failed (RuntimeError: out of memory)" in line for line in lines.said)
    assert any(line.startswith("[10/10]") for line in lines.said)
    assert lines.seen[-1][1] == 10
    assert lines.words[0] == "lora lr 0.00632 seed 0"
    # Five more searches of two seconds, and four final runs that will follow whatever they find.
    assert lines.words[1] == "lora lr 0.02 seed 0; about 0:18 left"
    assert {total for _, total in lines.seen} == {10}
    assert next(line for line in lines.said if line.startswith("[")).startswith("[1/10] lora lr 0.00632")
    assert worked(grid, scores)[0] == []  # nothing is repeated
    more = replace(grid, seeds=(0, 1, 2))
    assert worked(more, scores)[0] == ["lora-final-lr0.02-seed2", "dora-final-lr0.02-seed2"]


def test_a_run_in_training_counts_by_its_steps(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_of(recipe, tmp_path, "lora", seeds=1, search=False)
    steps = [Progress(grid.wanted({})[0], step, 8) for step in (2, 6)]
    news = FakePool.news
    monkeypatch.setattr(FakePool, "news", lambda self, seconds: [steps.pop(0)] if steps else news(self, seconds))
    _, lines = worked(grid, lambda _: 0.5)
    assert lines.seen == [(0.0, 1), (0.25, 1), (0.75, 1)]


def test_a_process_that_died_after_its_record_was_written_did_not_fail(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora", seeds=1, search=False)
    store = Store(grid.runs)

    def scores(run: Run) -> str:
        store.write(run, record_of(run, 0.5))
        return "the process was killed by signal -9"

    _, lines = worked(grid, scores)
    (record,) = store.records().values()
    assert record["train_info"]["status"] == "success"
    assert lines.said[-1].startswith("[1/1] lora lr 0.02 seed 0: accuracy 0.5000")


def test_a_run_that_another_process_took_over_from_one_that_died_is_not_failed(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora", seeds=1, search=False)
    claims = []

    def scores(run: Run) -> float | str:
        if not claims:
            claims.append(Store(grid.runs).claim(run))
            assert claims[0].__enter__()
            return "the process was killed by signal -9"
        claims[0].__exit__(None, None, None)
        return 0.5

    started, lines = worked(grid, scores)
    assert len(started) == 2
    assert not any("failed" in line for line in lines.said)
    assert [record["train_info"]["status"] for record in Store(grid.runs).records().values()] == ["success"]


def test_the_process_that_others_are_forked_off_is_quiet_before_it_imports_the_libraries() -> None:
    script = """if True:
        import logging, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "ranktune.compare.execution":
                    print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, logging.getLogger("torchao").level)
                    raise SystemExit
        sys.meta_path.insert(0, Finder())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import ranktune.compare.preload
    """
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", str(logging.ERROR)]


def test_runs_are_foreseen_before_the_search_has_chosen_their_rate(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora,dora", seeds=4)
    searches = grid.wanted({})
    assert (len(searches), len(grid.foreseen({}))) == (6, 14)
    lora = {run.id: record_of(run, {0.0632: 0.9}.get(run.rate, 0.5)) for run in searches if run.label == "lora"}
    assert len(grid.foreseen(lora)) == 15  # the search goes on beyond its best point
    every = {run.id: record_of(run, None, "failed") for run in searches}
    while missing := [run for run in grid.wanted(every) if run.id not in every]:
        every |= {run.id: record_of(run, None, "failed") for run in missing}
    assert grid.foreseen(every) == grid.wanted(every)
    assert {run.phase for run in grid.foreseen(every)} == {"search"}  # without any usable rate nothing follows


def test_a_methods_warning_says_whose_it_is(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid_of(recipe, tmp_path, "lora,dynamic-dora[dem_weight=0]", "train.max_steps=10", search=False)
    (said,) = [record.getMessage() for record in caplog.records if "shorter than prune_interval" in record.getMessage()]
    assert said.startswith("dynamic-dora[dem_weight=0]: the window of steps")
    assert not logging.getLogger("ranktune").filters


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_prepared(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path / "out" / "runs")
    monkeypatch.setattr("ranktune.compare.command.lay_out", lambda *_: pytest.fail("prepared"))
    for out, nearest in (("out", "out/runs"), ("file", "file"), ("file/below", "file")):
        options = Options(parse_methods("lora"), 1, tmp_path / out)
        for only in (False, True):
            with pytest.raises(RecipeError, match=f"--out: .*{tmp_path / nearest} is not a folder you may write in"):
                compare_recipe(load_recipe(recipe), recipe, options, None, report_only=only)


def test_the_bar_shows_the_name_of_a_variant_whole() -> None:
    shown = io.StringIO()
    with watching(Console(file=shown, force_terminal=True, width=120)) as watcher:
        watcher.say("a line while nothing has begun")
        begun = shown.getvalue()
        watcher.at(1.5, 4, "mor[num_experts=4] lr 0.01 seed 0; about 0:10 left")
    assert "getting ready" in begun
    assert "None" not in begun
    assert "1.5/4  mor[num_experts=4] lr 0.01 seed 0; about 0:10 left" in shown.getvalue()


def test_ctrl_c_keeps_what_is_finished_and_the_interrupted_run_is_not_counted(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora", seeds=2, search=False)
    store = Store(grid.runs)
    store.start()
    second = grid.wanted({})[1]
    store.begin(second)
    with pytest.raises(KeyboardInterrupt):
        worked(grid, lambda run: KeyboardInterrupt() if run.seed == 1 else 0.5)
    assert len(store.records()) == 1
    assert store.begin(second) == 1


def test_time_left_is_told_by_runs_of_the_same_kind(recipe: Path, tmp_path: Path) -> None:
    grid = grid_of(recipe, tmp_path, "lora,dora", seeds=2, search=False)
    runs = grid.wanted({})
    assert seconds_left(runs, {}, {}, 1) is None
    records = {runs[0].id: record_of(runs[0], 0.5, seconds=10.0), runs[2].id: record_of(runs[2], 0.5, seconds=30.0)}
    assert seconds_left(runs, records, {}, 1) == pytest.approx(40.0)
    assert seconds_left(runs, records, {runs[3].id: 0.5}, 2) == pytest.approx((10 + 15) / 2)
    only = {runs[0].id: records[runs[0].id]}
    assert seconds_left(runs, only, {}, 1) == pytest.approx(30.0)
    line = result_line(runs[0], records[runs[0].id], 1, 4, 75.0)
    assert line == "[1/4] lora lr 0.02 seed 0: accuracy 0.5000 in 0:10; about 1:15 left"


def test_ray_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ranktune.compare.ray_pool import load_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"pip install 'ranktune\[ray\]'"):
        load_ray()


def test_runs_go_through_ray(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with Ray's own calls: resources, remote functions, wait, get, errors, cancel."""
    import types

    from ranktune.compare import ray_pool

    class RayError(Exception):
        pass

    asked: dict[str, Any] = {}
    cancelled = []

    class Reference:
        def __init__(self, call: Any) -> None:
            self.call = call

    class Remote:
        def __init__(self, function: Any) -> None:
            self.function = function

        def remote(self, *arguments: Any) -> Any:
            return Reference(lambda: self.function(*arguments))

    def remote(**options: Any) -> Any:
        asked.update(options)
        return Remote

    def get(reference: Any) -> Any:
        try:
            return reference.call()
        except ValueError as error:
            raise RayError(f"task failed: {error}") from error

    ray = types.SimpleNamespace(
        init=lambda **_: None, cluster_resources=lambda: {"CPU": 8, "GPU": 2}, remote=remote, get=get,
        wait=lambda references, num_returns, timeout: (references[:num_returns], []),  # noqa: ARG005
        cancel=lambda reference, force: cancelled.append((reference, force)),
        exceptions=types.SimpleNamespace(RayError=RayError),
    )  # fmt: skip
    results: list[Any] = [True, ValueError("no such device")]

    def execute(*_: Any) -> Any:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(ray_pool, "execute", execute)
    with ray_pool.RayPool(Store(run_folder(run)), ray) as pool:
        assert pool.free == 2
        assert asked == {"num_gpus": 1, "max_retries": 0, "max_calls": 1}
        assert list(pool.news(0.1)) == []
        pool.start(run)
        assert (pool.free, pool.running) == (1, [run])
        assert list(pool.news(0.1)) == [Ended(run, True)]
        pool.start(run)
        assert list(pool.news(0.1)) == [Died(run, "task failed: no such device")]
        pool.start(run)
    assert [force for _, force in cancelled] == [True]


def test_a_share_is_told_in_words() -> None:
    from ranktune.compare.budget import residual_words

    shares = [("a", Share({}, 100, 100, "r=2")), ("b", Share({}, 100, 97, "x")), ("c", Share({}, None, None, "all"))]
    shares.append(("d", Share({}, 100, 100, "its own", at_most=True)))
    assert residual_words(shares) == [
        "a: 100 adapter parameters, exactly the budget; r=2",
        "b: 97 adapter parameters, -3 (-3.00%) beside the budget; x",
        "c: all",
        "d: at most 100 adapter parameters; its own",
    ]


def test_variants_take_the_recipes_words_that_mean_the_same() -> None:
    recipe = {"name": "dora", "r": 4, "use_dora": True, "lora_alpha": 8, "dora_dropout": "low_rank_path"}
    assert Variant("lora", "lora", {}).section(recipe, "r.yaml") == {"name": "lora", "r": 4, "lora_alpha": 8}
    assert Variant("dora", "dora", {"r": 2}).section(recipe, "r.yaml") == {**recipe, "r": 2}
    assert json.dumps(Variant("full", "full", {}).section(recipe, "r.yaml")) == '{"name": "full"}'
