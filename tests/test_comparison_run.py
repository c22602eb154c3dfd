"""`ranktune compare` for real, in miniature: processes that train, die and are gone on from; the same data for all."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Trainer
from typer.testing import CliRunner, Result

from ranktune.cli import app
from ranktune.compare.driver import Options, lay_out
from ranktune.compare.execution import execute
from ranktune.compare.grid import Run
from ranktune.compare.methods import parse_methods
from ranktune.compare.store import ATTEMPTS, Store
from ranktune.compare.workers import Ended, Progress, Workers
from ranktune.recipe import load_recipe
from ranktune.run.directory import RunDirectory
from ranktune.run.display import SilentDisplay
from ranktune.tasks import load_data
from ranktune.training import train
from tests.tiny import write_everything

MIB = 2**20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("compare"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def one_run(recipe: Path, out: Path, method: str, *overrides: str, search: bool = False) -> tuple[Run, Store]:
    grid = lay_out(load_recipe(recipe, overrides), recipe, Options(parse_methods(method), 1, out, search=search))
    store = Store(grid.runs)
    store.start()
    return grid.wanted({})[0], store


def executed(recipe: Path, out: Path, method: str, *overrides: str, **options: Any) -> dict[str, Any]:
    wanted, store = one_run(recipe, out, method, *overrides, **options)
    assert execute(wanted, store, lambda *_: None)
    return store.records()[wanted.id]


def test_every_run_has_a_process_of_its_own_that_may_have_others_load_its_data(recipe: Path, tmp_path: Path) -> None:
    """So what a run takes does not depend on the runs before it."""
    first, store = one_run(recipe, tmp_path, "lora", "train.max_steps=2", "train.num_workers=1")
    second, _ = one_run(recipe, tmp_path, "dora", "train.max_steps=2")
    seen: dict[str, set[int]] = {}
    with Workers(store, 1) as pool:
        for wanted in (first, second):
            pool.start(wanted)
            assert (pool.free, pool.running) == (0, [wanted])
            while pool.running:
                seen.setdefault(wanted.id, set()).update(process.pid for process in training(store.folder))
                for news in pool.news(0.01):
                    if not isinstance(news, Progress):
                        assert news == Ended(wanted, trained=True)
            assert not training(store.folder)
    assert all(seen.values())
    assert seen[first.id].isdisjoint(seen[second.id])
    assert {record["train_info"]["status"] for record in store.records().values()} == {"success"}


def training(runs: Path) -> list[psutil.Process]:
    """Processes that were started from this one and hold a file of the folder open."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(runs in Path(file.path).parents for file in process.open_files()):
                found.append(process)
    return found


def test_a_comparison_from_the_command_line_and_on_from_there(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weights = recipe.parent / "model" / "model.safetensors"
    kept = weights.read_bytes()
    asked = (recipe, "--methods", "lora,full", "--no-search", "--out", out, "train.max_steps=4")
    weights.unlink()  # found out only in the process that trains
    first = run(*asked, "--seeds", 1)
    assert first.exit_code == 0, first.output
    assert "lora lr 0.02 seed 0: failed (ranktune.errors.RecipeError: model: the weights" in first.output
    assert "full lr 0.002 seed 0: failed" in first.output
    weights.write_bytes(kept)
    again = run(*asked, "--seeds", 1)
    assert "[1/" not in again.output  # failures are results too
    second = run(*asked, "--seeds", 2, "--retry-failed")
    assert second.exit_code == 0, second.output
    assert "2 failed runs will be trained again" in second.output
    assert "[4/4]" in second.output
    names = {path.name for path in out.iterdir()}
    assert {"table.csv", "report.md", "report.html", "runs"} <= names
    assert {path.name for path in (out / "runs").iterdir() if path.suffix == ".json"} == {
        f"{method}-seed{seed}.json" for method in ("lora-final-lr0.02", "full-final-lr0.002") for seed in (0, 1)
    }
    assert (out / "runs" / "lora-final-lr0.02-seed0" / "adapter" / "adapter_config.json").exists()
    so_far = run(*asked, "--seeds", 3, "--report-only")
    assert "2 of 3 (1 not trained yet)" in so_far.output
    assert "at least 2 runs are still to be trained" in (out / "report.md").read_text()
    assert len(list((out / "runs").glob("*.json"))) == 4
    other = run(*asked, "--seeds", 2, "--report-only", "train.weight_decay=0.5")
    assert "train.weight_decay: 0.0 then, 0.5 now" in other.stderr
    nothing = run(*asked[:-2], tmp_path / "nothing", asked[-1], "--report-only")
    assert nothing.exit_code == 2
    assert "--report-only: no run has ended" in nothing.stderr
    assert not (tmp_path / "nothing").exists()
    other = run(*asked, "--seeds", 2, "train.weight_decay=0.5")
    assert other.exit_code == 2
    assert "train.weight_decay: 0.0 then, 0.5 now" in other.stderr


def test_records_have_the_fields_of_pefts_method_comparison(recipe: Path, tmp_path: Path) -> None:
    record = executed(recipe, tmp_path, "peft-adalora", "train.max_steps=12", "train.eval_every=5")
    assert {
        "created_at",
        "total_time",
        "experiment_name",
        "peft_branch",
        "train_config",
        "peft_config",
        "error_msg",
    } == set(record["run_info"])
    info = record["train_info"]
    assert {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    } <= info.keys()  # fmt: skip
    assert {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"} == record["meta_info"].keys()
    assert info["status"] == "success"
    assert 50 * MIB < info["accelerator_memory_reserved_avg"] <= info["accelerator_memory_max"]
    assert info["accelerator_memory_reserved_99th"] <= info["accelerator_memory_max"]
    directory = RunDirectory(tmp_path / "runs" / "peft-adalora-final-lr0.0632-seed0")
    metrics = directory.read_metrics()
    assert [entry["step"] for entry in info["metrics"]] == [5, 10, 12]
    assert all("test accuracy" in entry for entry in info["metrics"])  # scores of the evaluation data, on the way too
    last = info["metrics"][-1]
    assert last["test accuracy"] == metrics["after"] == record["comparison"]["score"]
    # 12 steps of 16 examples; the tokens without padding are between the shortest and the longest text's.
    assert 12 * 16 * 8 <= last["train total tokens"] <= 12 * 16 * 16
    assert info["tokens_per_second"] == pytest.approx(last["train total tokens"] / info["train_time"])
    assert info["num_trainable_params"] < info["num_training_params"]
    assert info["file_size"] == (directory.adapter / "adapter_model.safetensors").stat().st_size
    assert record["ranks"]["total"] == sum(record["ranks"]["final"].values()) == metrics["total_rank"]


@pytest.mark.parametrize(("method", "peft_type"), [("dora", "RANKTUNE"), ("peft-dora", "LORA"), ("full", None)])
def test_the_page_of_pefts_comparison_can_read_a_record(
    recipe: Path, tmp_path: Path, method: str, peft_type: str | None
) -> None:
    """What `method_comparison/processing.py` takes out of every JSON, as which kind of number."""
    record = executed(recipe, tmp_path, method, "train.max_steps=1")
    info, training, meta = record["run_info"], record["train_info"], record["meta_info"]
    assert info["train_config"]["model_id"] == str(recipe.parent / "model")
    assert (info["peft_config"] or {"peft_type": None})["peft_type"] == peft_type
    assert isinstance(info["experiment_name"], str)
    assert isinstance(info["created_at"], str)
    last = training["metrics"][-1]
    whole = ["accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"]
    for name in (*whole, "file_size", "num_trainable_params", "num_total_params"):
        assert isinstance(training[name], int), name
    for name in ("train samples", "train total tokens"):
        assert isinstance(last[name], int), name
    for number in (training["train_time"], info["total_time"], last["train loss"], last["test accuracy"]):
        assert isinstance(number, float)
    assert {f"{name}-version" for name in ("peft", "transformers", "datasets", "torch")} <= meta["package_info"].keys()


def test_a_search_scores_on_a_part_of_the_training_data_and_leaves_no_weights(recipe: Path, tmp_path: Path) -> None:
    record = executed(recipe, tmp_path, "lora", "train.max_steps=2", search=True)
    assert record["comparison"]["phase"] == "search"
    assert "valid accuracy" in record["train_info"]["metrics"][-1]
    folder = tmp_path / "runs" / "lora-search-lr0.00632-seed0"
    assert (folder / "metrics.json").exists()
    assert not (folder / "adapter").exists()
    whole = load_data(load_recipe(recipe).data, 0)
    held = load_data(load_recipe(folder / "recipe.yaml").data, 0)
    assert len(held.train) + len(held.evaluation) == len(whole.train)
    assert len(held.evaluation) == pytest.approx(0.1 * len(whole.train), abs=1)
    texts = {name: set(split["text"]) for name, split in (("train", held.train), ("held", held.evaluation))}
    assert texts["train"] | texts["held"] == set(whole.train["text"])
    assert not texts["train"] & texts["held"]


def test_a_run_that_diverges_is_recorded_as_such(recipe: Path, tmp_path: Path) -> None:
    record = executed(recipe, tmp_path, "lora", "train.learning_rate=1e30", "train.max_steps=6")
    assert record["train_info"]["status"] == "diverged"
    assert record["comparison"]["score"] is None


def test_a_nested_adapter_gets_its_rank_curve(recipe: Path, tmp_path: Path) -> None:
    executed(recipe, tmp_path, "dylora", "train.max_steps=4")
    curve = (tmp_path / "runs" / "dylora-final-lr0.02-seed0" / "rank_curve.csv").read_text().splitlines()
    assert curve[0].startswith("rank,parameters")
    assert [line.split(",")[0] for line in curve[1:]] == ["1", "2"]


def test_a_run_that_keeps_killing_its_process_is_given_up(recipe: Path, tmp_path: Path) -> None:
    wanted, store = one_run(recipe, tmp_path, "lora")
    for _ in range(ATTEMPTS):
        store.begin(wanted)
    assert execute(wanted, store, lambda *_: None)
    record = store.records()[wanted.id]
    assert record["train_info"]["status"] == "failed"
    assert "killed 2 times" in record["run_info"]["error_msg"]
    assert not execute(wanted, store, lambda *_: None)  # it has its record


def test_every_method_sees_the_same_batches(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    step = Trainer.training_step

    def spy(self: Trainer, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", spy)
    batches = {}
    for name in ("lora", "dynamic-dora", "dylora", "peft-adalora", "full"):
        wanted, _ = one_run(recipe, tmp_path / name, name, "train.max_steps=7")
        train(wanted.recipe, recipe, SilentDisplay())
        batches[name], seen[:] = list(seen), []
    for name, found in batches.items():
        assert len(found) == 7
        for one, reference in zip(found, batches["lora"], strict=True):
            assert torch.equal(one, reference), name


@pytest.mark.filterwarnings("ignore")  # Ray's own, about its next release
def test_a_comparison_on_a_real_ray(recipe: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ranktune[ray]'")
    out = tmp_path / "out"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        asked = (recipe, "--methods", "lora,dora", "--no-search", "--seeds", 1, "--ray", "--out", out)
        found = run(*asked, "train.max_steps=2", "method.r=3")
        weights = recipe.parent / "model" / "model.safetensors"
        kept = weights.read_bytes()
        weights.unlink()
        try:
            broken = run(*asked[:-1], tmp_path / "broken", "train.max_steps=2")
        finally:
            weights.write_bytes(kept)
    finally:
        ray.shutdown()
    assert found.exit_code == 0, found.output
    assert "[2/2]" in found.output
    records = Store(out / "runs").records()
    assert {record["train_info"]["status"] for record in records.values()} == {"success"}
    assert len(records) == 2
    assert (out / "report.html").exists()
    assert "lora lr 0.02 seed 0: failed (ranktune.errors.RecipeError: model: the weights" in broken.output


def test_records_are_strict_json(recipe: Path, tmp_path: Path) -> None:
    executed(recipe, tmp_path, "lora", "train.max_steps=1")
    (path,) = (tmp_path / "runs").glob("*.json")
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
