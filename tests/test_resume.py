"""`ranktune train --resume`: torn checkpoints, what may change and what may not, replanning, and finished runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from ranktune.errors import AdapterFileError
from ranktune.recipe import load_recipe
from ranktune.run.checkpoints import Checkpoint, find_checkpoint
from ranktune.run.directory import RunDirectory
from ranktune.run.display import SilentDisplay
from ranktune.run.manifest import altered, write_manifest
from ranktune.training import train
from tests.command_line import command
from tests.tiny import LINEAR_MODULES, write_everything

METHOD = "method={name: dynamic-dora, r: 2, prune_interval: 2, lora_dropout: 0.1}"


def refused(*arguments: object) -> str:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, 6 an epoch, with checkpoints at 2, 4 ... 12, in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_everything(folder)
    result = command("train", recipe, METHOD, "train.epochs=2", "train.save_every=2", "train.save_total_limit=null")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run as if it had been killed after step 9."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    for step in (10, 12):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
    for name in ("metrics.json", "ranks.json"):
        (out / name).unlink()
    shutil.rmtree(out / "adapter")
    return out


def tensors(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def test_a_finished_run_is_left_as_it_is(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "out").rglob("*") if path.is_file()}
    result = command("train", "--resume", finished / "out")
    assert result.exit_code == 0, result.output
    assert "is finished after 12 steps: there is nothing to resume" in result.stdout
    assert "accuracy after" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_resumed_run_says_what_its_time_covers_and_keeps_the_score_before(stopped: Path, finished: Path) -> None:
    checkpoint = json.loads((stopped / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    spent = checkpoint["stateful_callbacks"]["EventCallback"]["attributes"]["seconds"]
    result = command("train", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert "going on from checkpoint-8: 8 of 12 steps are done" in result.stdout
    assert "before training" not in result.stdout
    assert tensors(stopped) == tensors(finished / "out")
    found, expected = metrics_of(stopped), metrics_of(finished / "out")
    assert found["scores"] == expected["scores"]
    assert found["seconds"] > spent > 0
    assert (found["resumed_at"], expected["resumed_at"]) == ([8], [])
    events = RunDirectory(stopped).read_events()
    assert {"event": "resume", "step": 8, "replanned": False} in events
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == sorted(set(steps))


def test_a_run_resumes_where_it_was_moved_to(stopped: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = stopped.rename(stopped.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    result = command("train", "--resume", "moved", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert tensors(moved) == tensors(finished / "out")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda path: (path / "rng_state.pth").unlink(), "rng_state*.pth is missing"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda path: os.truncate(path / "optimizer.pt", 999), "optimizer.pt is cut short"),
        (lambda path: os.truncate(path / "scheduler.pt", 0), "scheduler.pt is cut short"),
        (lambda path: os.truncate(path / "rng_state.pth", 5000), "rng_state.pth is cut short"),
        (lambda path: os.truncate(path / "adapter_model.safetensors", 9000), "adapter_model.safetensors is cut short"),
        (lambda path: os.truncate(path / "adapter_model.safetensors", 4), "adapter_model.safetensors is cut short"),
        (lambda path: os.truncate(path / "adapter_config.json", 9), "adapter_config.json is cut short"),
        (lambda path: os.truncate(path / "trainer_state.json", 99), "trainer_state.json is cut short"),
        (
            lambda path: shutil.copy(path.with_name("checkpoint-6") / "trainer_state.json", path),
            "trainer_state.json is that of step 6",
        ),
        (lambda path: (path / "scaler.pt").write_bytes(b"half"), "scaler.pt is cut short"),
    ],
)
def test_a_torn_checkpoint_is_passed_over(stopped: Path, harm: Any, words: str) -> None:
    folder = stopped / "checkpoints"
    (folder / "checkpoint-x").mkdir()
    (folder / "notes").write_text("mine")
    assert newest(folder).step == 8
    harm(folder / "checkpoint-8")
    found = find_checkpoint(folder)
    assert (newest(folder).step, list(found.torn)) == (6, [folder / "checkpoint-8"])
    assert words.split(" ")[0].replace("*", "") in found.torn[folder / "checkpoint-8"]
    # An earlier version's, which only their structure tells of.
    for path in folder.glob("*/manifest.json"):
        path.unlink()
    found = find_checkpoint(folder)
    assert (newest(folder).step, list(found.torn)) == (6, [folder / "checkpoint-8"])
    assert words in found.torn[folder / "checkpoint-8"]
    found.remove_torn()
    assert not (folder / "checkpoint-8").exists()
    assert find_checkpoint(folder).torn == {}
    assert find_checkpoint(stopped / "nowhere").newest is None


def newest(folder: Path) -> Checkpoint:
    found = find_checkpoint(folder).newest
    assert found is not None
    return found


def flip(path: Path) -> None:
    """Two bytes in the middle of a file become others; its length and structure stay."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2] = bytes(byte ^ 255 for byte in content[middle : middle + 2])
    path.write_bytes(content)


CHECKPOINT_FILES = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_flipped_bytes_are_noticed(stopped: Path, name: str) -> None:
    checkpoint = stopped / "checkpoints" / "checkpoint-8"
    assert newest(checkpoint.parent).verified
    flip(checkpoint / name)
    found = find_checkpoint(checkpoint.parent)
    assert newest(checkpoint.parent).step == 6
    assert found.torn == {checkpoint: f"{name} was altered"}


def test_an_altered_checkpoint_is_passed_over_in_favour_of_an_older_one(stopped: Path, finished: Path) -> None:
    flip(stopped / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors")
    result = command("train", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert "checkpoint-8 is not whole: adapter_model.safetensors was altered" in result.stdout
    assert "going on from checkpoint-6: 6 of 12 steps are done" in result.stdout
    assert tensors(stopped) == tensors(finished / "out")
    assert metrics_of(stopped)["scores"] == metrics_of(finished / "out")["scores"]


def test_the_manifest_lists_every_file_and_what_is_wrong_with_it(stopped: Path) -> None:
    checkpoint = stopped / "checkpoints" / "checkpoint-8"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    listed = manifest["files"]
    assert set(listed) == {*CHECKPOINT_FILES, "adapter_config.json", "trainer_state.json"} | {
        path.name for path in checkpoint.iterdir() if path.name.startswith(("tokenizer", "special", "vocab"))
    }
    for name, entry in listed.items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"bytes": len(content), "blake2b": hashlib.blake2b(content, digest_size=32).hexdigest()}
    (checkpoint / "README.md").write_text("my notes")
    (checkpoint / "notes.txt").write_text("mine")
    assert altered(checkpoint) is None
    with (checkpoint / "training_args.bin").open("ab") as file:
        file.write(b"more")
    assert altered(checkpoint) == "training_args.bin was altered"
    size = listed["training_args.bin"]["bytes"]
    os.truncate(checkpoint / "training_args.bin", size - 3)
    assert altered(checkpoint) == f"training_args.bin is cut short: it has {size - 3:,} of {size:,} bytes"
    (checkpoint / "training_args.bin").unlink()
    assert altered(checkpoint) == "training_args.bin is missing"
    for text in ("{", "[]", '{"files": {"optimizer.pt": 3}}'):
        (checkpoint / "manifest.json").write_text(text)
        assert altered(checkpoint) == "manifest.json was altered"


def test_the_manifest_is_written_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where older checkpoints are rotated away: what it lists is there and complete."""
    seen = []

    def after_everything(checkpoint: Path) -> None:
        seen.append({path.name for path in checkpoint.iterdir()})
        write_manifest(checkpoint)
        assert altered(checkpoint) is None

    monkeypatch.setattr("ranktune.run.saving.write_manifest", after_everything)
    result = command("train", write_everything(tmp_path), "train.save_every=3", "train.save_total_limit=1", "--quiet")
    assert result.exit_code == 0, result.output
    assert len(seen) == 2
    assert all({"trainer_state.json", *CHECKPOINT_FILES} <= names for names in seen)


def test_checkpoints_of_an_earlier_version_are_taken_and_unfinished_ones_are_not(stopped: Path, finished: Path) -> None:
    folder = stopped / "checkpoints"
    (folder / "checkpoint-8" / "manifest.json").unlink()
    found = find_checkpoint(folder)
    assert (newest(folder).step, found.torn) == (6, {folder / "checkpoint-8": "manifest.json is missing"})
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}" / "manifest.json").unlink()
    assert newest(folder).step == 8
    assert not newest(folder).verified
    result = command("train", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert "checkpoint-8 has no manifest.json, as those of earlier versions: its files are complete" in result.stdout
    assert tensors(stopped) == tensors(finished / "out")


def test_with_every_checkpoint_torn_the_run_starts_anew(stopped: Path, finished: Path) -> None:
    for path in (stopped / "checkpoints").iterdir():
        (path / "optimizer.pt").unlink()
    result = command("train", "--resume", stopped)
    assert result.exit_code == 0, result.output
    for step in (2, 4, 6, 8):
        assert f"checkpoint-{step} is not whole: optimizer.pt is missing" in result.stdout
    assert "there is no whole checkpoint: the run starts anew, from step 0" in result.stdout
    assert tensors(stopped) == tensors(finished / "out")
    assert metrics_of(stopped)["resumed_at"] == []


def test_what_was_half_written_is_removed(stopped: Path) -> None:
    (stopped / ".adapter.abc.tmp").mkdir()
    (stopped / ".metrics.json.abc.tmp").write_text("{")
    (stopped / ".mine.tmp").write_text("")
    assert command("train", "--resume", stopped, "--quiet").exit_code == 0
    assert [path.name for path in stopped.glob(".*")] == [".mine.tmp"]


def test_a_log_that_lost_its_end_is_gone_on_with(stopped: Path) -> None:
    log = stopped / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]))
    assert command("train", "--resume", stopped, "--quiet").exit_code == 0
    events = RunDirectory(stopped).read_events()
    assert [event["event"] for event in events[:4]] == ["start", "evaluation", "step", "resume"]


FREE = [
    "train.eval_batch_size=8", "train.eval_every=never", "train.save_every=3", "train.save_total_limit=2",
    "train.logging_steps=1", "train.num_workers=1",
]  # fmt: skip


def test_what_does_not_change_the_run_may_change(stopped: Path, finished: Path) -> None:
    result = command("train", "--resume", stopped, *FREE, "--quiet")
    assert result.exit_code == 0, result.output
    assert tensors(stopped) == tensors(finished / "out")
    # The best one, which Trainer keeps, and the last.
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12"}
    written = yaml.safe_load((stopped / "recipe.yaml").read_text())["train"]
    assert (written["save_every"], written["logging_steps"]) == (3, 1)
    steps = [event["step"] for event in RunDirectory(stopped).read_events() if event["event"] == "step"]
    assert steps[-4:] == [9, 10, 11, 12]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.r=3"], ["'method.r' was 2, now 3", "another run", "output="]),
        (["train.learning_rate=0.1"], ["'train.learning_rate' was 0.02, now 0.1"]),
        (["train.seed=1", "--replan"], ["'train.seed' was 0, now 1", "with --replan also: ", "train.epochs"]),
        (["data.max_length=8"], ["'data.max_length' was 16, now 8"]),
        (["model=all-minilm"], ["'model' was"]),
        (["train.epochs=3"], ["'train.epochs' was 2.0, now 3.0", "--replan", "over the steps that remain"]),
        (["train.max_steps=30"], ["'train.max_steps' was None, now 30", "--replan"]),
        (["train.batch_size=8"], ["'train.batch_size' was 16, now 8", "--replan"]),
        (["train.gradient_accumulation=2"], ["'train.gradient_accumulation' was 1, now 2", "--replan"]),
        (["data.max_train_examples=50"], ["'data.max_train_examples' was None, now 50", "--replan"]),
        (["output=elsewhere"], ["'output'"]),
        (["train.epoch=3"], ["'train.epoch'", "Did you mean 'train.epochs'?"]),
        (["recipe.yaml"], ["leave recipe.yaml out"]),
        (["--overwrite"], ["neither with --dry-run nor with --overwrite"]),
        (["--dry-run"], ["neither with --dry-run nor with --overwrite"]),
        (["train.epochs=1.2", "--replan"], ["8 steps are done", "would now have 8", "nothing remains to be trained"]),
    ],
)
def test_what_would_be_another_run_is_refused_and_nothing_is_lost(
    stopped: Path, overrides: list[str], words: list[str]
) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    message = refused("train", "--resume", stopped, *overrides)
    for word in words:
        assert word in message
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def edit_recipe(out: Path, section: str, **changes: Any) -> None:
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe[section] |= changes
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("train", {"learning_rate": 0.1}, ["'train.learning_rate' was 0.02, now 0.1", "another run", "output="]),
        ("train", {"seed": 1}, ["'train.seed' was 0, now 1"]),
        ("method", {"dem_weight": 0.5}, ["'method.dem_weight' was 0.1, now 0.5"]),
        ("train", {"epochs": 3.0}, ["'train.epochs' was 2.0, now 3.0", "--replan"]),
        ("data", {"max_length": 8}, ["'data.max_length' was 16, now 8"]),
    ],
)
def test_an_edited_recipe_is_refused_like_an_override(
    stopped: Path, finished: Path, tmp_path: Path, section: str, changes: dict[str, Any], words: list[str]
) -> None:
    complete = shutil.copytree(finished / "out", tmp_path / "complete")
    for out in (stopped, complete):
        edit_recipe(out, section, **changes)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        message = refused("train", "--resume", out)
        for word in words:
            assert word in message
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_edits_that_do_not_change_the_run_are_taken(stopped: Path, finished: Path) -> None:
    """More logging, other names of the same values, and keys of another version."""
    edit_recipe(stopped, "train", logging_steps=1, epochs=2)
    edit_record(stopped, lambda record: record["recipe"]["train"].pop("num_workers"))
    edit_record(stopped, lambda record: record["recipe"]["method"].update(once_there_was="a field"))
    result = command("train", "--resume", stopped, "--quiet")
    assert result.exit_code == 0, result.output
    assert tensors(stopped) == tensors(finished / "out")


def test_an_edit_before_the_first_checkpoint_is_a_new_beginning(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    edit_recipe(stopped, "train", learning_rate=0.1)
    assert command("train", "--resume", stopped, "--quiet").exit_code == 0
    steps = [event for event in RunDirectory(stopped).read_events() if event["event"] == "step"]
    assert max(event["learning_rate"] for event in steps) == pytest.approx(0.1, rel=0.2)


def test_a_base_model_and_data_that_were_moved_are_found_at_their_new_places(stopped: Path, finished: Path) -> None:
    for name in ("model", "data"):
        shutil.copytree(finished / name, stopped.with_name(name))
    recipe = yaml.safe_load((stopped / "recipe.yaml").read_text())
    recipe["model"] = str(stopped.with_name("model"))
    recipe["data"]["source"] = str(stopped.with_name("data"))
    (stopped / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    message = refused("train", "--resume", stopped)
    assert "'model' was" in message  # the old one is still there, so this is another one
    assert "'data.source'" not in message.split("would make")[0]
    gone = str(stopped.with_name("old-place"))
    edit_record(stopped, lambda record: record["recipe"].update(model=gone))
    result = command("train", "--resume", stopped, "--quiet")
    assert result.exit_code == 0, result.output
    assert tensors(stopped) == tensors(finished / "out")


def test_evaluations_of_a_run_that_stops_early_may_not_change(stopped: Path) -> None:
    recipe = yaml.safe_load((stopped / "recipe.yaml").read_text())
    change = {"early_stopping_patience": 1, "eval_every": 2, "save_every": 2}
    recipe["train"] |= change
    (stopped / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    edit_record(stopped, lambda record: record["recipe"]["train"].update(change))
    message = refused("train", "--resume", stopped, "train.eval_every=4", "train.save_every=4")
    assert "'train.eval_every' was 2, now 4" in message


def edit_record(out: Path, change: Callable[[dict[str, Any]], Any], step: int = 8) -> None:
    """As if the checkpoint had been written with another record of the run."""
    path = out / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state["stateful_callbacks"]["EventCallback"]["attributes"])
    path.write_text(json.dumps(state))
    write_manifest(path.parent)


def test_other_data_and_other_processes_are_noticed(stopped: Path) -> None:
    edit_record(stopped, lambda record: record["shape"].update(world_size=2))
    message = refused("train", "--resume", stopped)
    assert "checkpoint-8 belongs to another run: world size was 2, now 1" in message
    assert "--replan" in message
    edit_record(stopped, lambda record: record["shape"].update(world_size=1))
    recipe = yaml.safe_load((stopped / "recipe.yaml").read_text())
    data = shutil.copytree(recipe["data"]["source"], stopped.with_name("data"))
    recipe["data"]["source"] = str(data)
    (stopped / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (data / "train.csv").open("a") as file:
        file.write("a red cat,colour\n")
    message = refused("train", "--resume", stopped)
    assert "the data is not the data it was trained on" in message
    assert "total steps was 12, now 14" in message
    result = command("train", "--resume", stopped, "--replan", "--quiet")
    assert result.exit_code == 0, result.output
    assert metrics_of(stopped)["steps"] == 14


def test_replanning_gives_the_run_another_length(stopped: Path) -> None:
    result = command("train", "--resume", stopped, "--replan", "train.epochs=5")
    assert result.exit_code == 0, result.output
    assert "going on from checkpoint-8: 8 of 30 steps are done" in result.stdout
    metrics = metrics_of(stopped)
    assert (metrics["steps"], metrics["total_rank"]) == (30, 2 * LINEAR_MODULES)
    events = RunDirectory(stopped).read_events()
    assert {"event": "resume", "step": 8, "replanned": True} in events
    assert yaml.safe_load((stopped / "recipe.yaml").read_text())["train"]["epochs"] == 5
    # Killed after that, it resumes under its new plan without a word.
    expected = tensors(stopped), (stopped / "ranks.json").read_bytes()
    (stopped / "metrics.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-30")
    result = command("train", "--resume", stopped, "--quiet")
    assert result.exit_code == 0, result.output
    assert (tensors(stopped), (stopped / "ranks.json").read_bytes()) == expected


def test_a_finished_run_can_be_made_longer(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished / "out", tmp_path / "out")
    assert "'train.epochs' was 2.0, now 3.0" in refused("train", "--resume", out, "train.epochs=3")
    assert metrics_of(out)["steps"] == 12
    result = command("train", "--resume", out, "train.epochs=3", "--replan", "--quiet")
    assert result.exit_code == 0, result.output
    assert metrics_of(out)["steps"] == 18
    first, longer = (json.loads((place / "ranks.json").read_text()) for place in (finished / "out", out))
    assert longer["final"] == first["final"]
    assert longer["history"] == first["history"]


def test_places_without_a_run_are_refused(tmp_path: Path) -> None:
    assert "there is no directory" in refused("train", "--resume", tmp_path / "nowhere")
    assert "holds no run to go on with" in refused("train", "--resume", tmp_path)
    assert "give a recipe" in refused("train")
    assert "--replan belongs to --resume" in refused("train", write_everything(tmp_path), "--replan")


def test_two_processes_do_not_train_in_one_directory(stopped: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with RunDirectory(stopped).held():
        assert "another process is training in" in refused("train", "--resume", stopped)
        message = refused("train", finished / "recipe.yaml", f"output={stopped}", "--overwrite")
        assert "another process is training in" in message
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_early_stopping_survives_a_crash_after_it(tmp_path: Path) -> None:
    """A rate that ruins the model after a good start; the best checkpoint is returned to."""
    recipe = write_everything(tmp_path)
    arguments = [
        "train.epochs=40", "train.eval_every=3", "train.early_stopping_patience=2", "train.learning_rate=0.3",
        "train.lr_scheduler=constant", "train.max_grad_norm=0", "train.warmup_ratio=0.0", "train.save_total_limit=null",
    ]  # fmt: skip
    assert command("train", recipe, *arguments, "--quiet").exit_code == 0
    out = tmp_path / "out"
    expected = tensors(out), metrics_of(out)
    last = max(int(path.name.split("-")[1]) for path in (out / "checkpoints").iterdir())
    assert last == expected[1]["steps"] < 240
    for lost in ([], [last]):
        (out / "metrics.json").unlink()
        for step in lost:
            shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
        result = command("train", "--resume", out, "--quiet")
        assert result.exit_code == 0, result.output
        assert tensors(out) == expected[0]
        assert metrics_of(out)["steps"] == last
        assert metrics_of(out)["scores"] == expected[1]["scores"]


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A finished run whose best checkpoint is not its last, as if it had been killed at the very end; the best step."""
    folder = tmp_path_factory.mktemp("ruined")
    arguments = [
        "train.epochs=40", "train.eval_every=3", "train.early_stopping_patience=2", "train.learning_rate=0.3",
        "train.lr_scheduler=constant", "train.max_grad_norm=0", "train.warmup_ratio=0.0", "train.save_total_limit=null",
    ]  # fmt: skip
    assert command("train", write_everything(folder), *arguments, "--quiet").exit_code == 0
    (folder / "out" / "metrics.json").unlink()
    newest = find_checkpoint(folder / "out" / "checkpoints").newest
    assert newest is not None
    assert 0 < newest.state["best_global_step"] < newest.step
    return folder / "out", newest.state["best_global_step"]


def test_an_altered_best_checkpoint_is_not_what_a_run_ends_with(ruined: tuple[Path, int], tmp_path: Path) -> None:
    """Noticed before anything is trained, and again by whoever loads it; what the message advises works."""
    shutil.copytree(ruined[0], tmp_path / "out")
    best = tmp_path / "out" / "checkpoints" / f"checkpoint-{ruined[1]}"
    flip(best / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out" / "adapter")
    message = refused("train", "--resume", tmp_path / "out")
    assert f"{best} is the best checkpoint" in message
    assert "not as it was written: adapter_model.safetensors was altered" in message
    assert not (tmp_path / "out" / "adapter").exists()
    shutil.rmtree(best)  # as the message says
    result = command("train", "--resume", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (
        f"checkpoint-{ruined[1]}, the best so far, is gone: unless a later one is better, the run ends as at its"
        in (result.stdout)
    )
    last = max((tmp_path / "out" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    ended, at_last = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out" / "adapter", last)
    )
    assert all(torch.equal(tensor, at_last[name]) for name, tensor in ended.items() if "lora_" in name)


def test_a_best_checkpoint_that_is_altered_while_the_run_goes_on(tmp_path: Path) -> None:
    """The run ends with an error, and with everything that it needs to be resumed."""

    class Altering(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.best_global_step is not None and state.global_step == state.best_global_step + 1:
                flip(Path(state.best_model_checkpoint) / "adapter_model.safetensors")

    recipe = write_everything(tmp_path)
    arguments = [
        "train.epochs=40", "train.eval_every=3", "train.early_stopping_patience=2", "train.learning_rate=0.3",
        "train.lr_scheduler=constant", "train.max_grad_norm=0", "train.warmup_ratio=0.0",
    ]  # fmt: skip
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors was altered"):
        train(load_recipe(recipe, arguments), recipe, SilentDisplay(), callbacks=[Altering()])
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert find_checkpoint(tmp_path / "out" / "checkpoints").newest is not None


def test_whole_models_are_resumed_and_stock_adalora_is_not(tmp_path: Path) -> None:
    recipe = write_everything(tmp_path)
    shared = ["train.epochs=2", "train.save_every=2", "train.save_total_limit=null", "--quiet"]
    out = tmp_path / "out"
    assert command("train", recipe, "method={name: full}", "train.learning_rate=1e-3", *shared).exit_code == 0
    expected = (out / "adapter" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    os.truncate(out / "checkpoints" / "checkpoint-10" / "model.safetensors", 10000)
    (out / "metrics.json").unlink()
    result = command("train", "--resume", out)
    assert result.exit_code == 0, result.output
    assert "checkpoint-10 is not whole: model.safetensors is cut short" in result.stdout
    assert (out / "adapter" / "model.safetensors").read_bytes() == expected
    assert command("train", recipe, "method={name: peft-adalora, r: 2}", *shared, "--overwrite").exit_code == 0
    (out / "metrics.json").unlink()
    assert "peft-adalora keeps its running averages in no checkpoint" in refused("train", "--resume", out)


def test_other_fixes_of_what_is_said(tmp_path: Path) -> None:
    recipe = write_everything(tmp_path)
    message = refused("train", recipe, "method.r=0", "train.optimizer=adamm")
    assert f"{recipe} with train.optimizer=adamm: 'train.optimizer'" in message
    assert f"{recipe} with method.r=0: section 'method': r=0" in refused("train", recipe, "method.r=0")
    assert f"{recipe}: unknown key" in refused("train", write_everything(tmp_path), "trane.epochs=1")
    result = command("train", recipe, METHOD, "train.epochs=2")
    assert result.stdout.count("step 12:  accuracy") == 1  # scored again after compaction, said once


def test_a_resumed_run_shows_the_ranks_it_goes_on_with(stopped: Path) -> None:
    recorded = [event for event in RunDirectory(stopped).read_events() if event["event"] == "step"]
    rank = next(event["total_rank"] for event in recorded if event["step"] == 8)
    assert rank == 2 * LINEAR_MODULES  # 3 each at the start
    result = command("train", "--resume", stopped)
    assert f"restored at step 8: {LINEAR_MODULES} modules of total rank {rank}, " in result.stdout
    assert f"total rank {3 * LINEAR_MODULES}" not in result.stdout


@pytest.mark.parametrize("resumed", [False, True])
def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    recipe, out = write_everything(tmp_path), tmp_path / "out"
    original, moment = Trainer.training_step, 0

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == moment:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    result = command("train", recipe, "train.save_every=2")
    assert result.exit_code == 130
    way_on = f"ranktune train --resume {out}"
    assert f"there is no checkpoint yet (train.save_every), so {way_on} begins at step 0" in result.stderr
    moment = 3
    first = ["--resume", out] if resumed else [recipe, "--overwrite", "train.save_every=2"]
    result = command("train", *first)
    assert result.exit_code == 130
    assert result.stderr == f"interrupted; checkpoint-2 is the last checkpoint; resume with: {way_on}\n"


def test_the_final_scores_are_logged_once_and_in_one_order(stopped: Path, finished: Path) -> None:
    assert command("train", "--resume", stopped, "--quiet").exit_code == 0
    for out in (stopped, finished / "out"):
        events = RunDirectory(out).read_events()
        scored = [event["step"] for event in events if event["event"] == "evaluation"]
        assert scored == [0, 6, 12]
        assert events[-1]["scores"] == metrics_of(out)["scores"]["after"]
    one, other = ((out / "metrics.json").read_text() for out in (stopped, finished / "out"))
    shown = [text[text.index('"scores"') : text.index('"model"')] for text in (one, other)]
    assert shown[0] == shown[1]
