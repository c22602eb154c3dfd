"""The command line: exit codes, messages, what is refused before a model is loaded, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main
import yaml
from typer.testing import CliRunner

from ranktune.cli import app
from ranktune.run.directory import folder_beside
from tests.command_line import command
from tests.tiny import LINEAR_MODULES, write_data, write_everything, write_recipe

FILES = {"adapter", "checkpoints", "log.jsonl", "loss.png", "metric.png", "metrics.json", "ranks.json", "ranks.png"}


def refused(*arguments: object) -> str:
    """The message of a refusal, once it is known to be one."""
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_everything(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `out`; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("trained")
    result = command("train", write_everything(folder))
    assert result.exit_code == 0, result.output
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("name", [one.callback.__name__ for one in app.registered_commands])
def test_every_command_refuses_in_one_message_and_tells_more_when_asked(name: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    needed = {"merge": ("--out", tmp_path / "out"), "squeeze": ("--budget", "rank=3"), "truncate": ("--rank", 1)}
    assert str(nowhere) in refused(name, nowhere, *needed.get(name, ()))
    assert "Traceback" in command(name, nowhere, *needed.get(name, ()), "--debug").stderr


def test_cores_are_shared_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    command("plot", tmp_path)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    command("plot", tmp_path)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_folder_beside_one_that_was_given_by_dots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "inner")
    for given in (Path(".."), tmp_path / "run", Path("../../run/")):
        assert folder_beside(given, "rank4").resolve() == tmp_path.resolve() / "run-rank4"


def test_help_is_light_and_teaches() -> None:
    code = (
        "import sys\nsys.argv = ['ranktune', '--help']\nfrom ranktune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'pydantic', 'numpy', 'yaml'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "train" in done.stdout
    assert "evaluate" in done.stdout
    for name in ("train", "evaluate", "plot"):
        shown = command(name, "--help").output
        assert f"ranktune {name} " in shown
        assert "Example" in shown


def test_version() -> None:
    result = command("--version")
    assert result.exit_code == 0
    assert result.output.strip() == "ranktune 0.1.0"


def test_a_run_leaves_what_the_documentation_says(trained: Path) -> None:
    out = trained / "out"
    assert {item.name for item in out.iterdir()} == FILES | {"recipe.yaml"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {item.name for item in (out / "adapter").iterdir()}
    metrics = metrics_of(trained)
    assert {
        "method", "task", "metric", "before", "after", "trainable_params", "active_params", "total_rank", "steps",
        "seconds", "peak_memory_mb", "adapter_bytes", "seed", "versions",
    } <= metrics.keys()  # fmt: skip
    assert metrics["method"] == "lora"
    assert metrics["metric"] == "accuracy"
    assert metrics["total_rank"] == 2 * LINEAR_MODULES
    assert metrics["steps"] == 6
    assert metrics["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    ranks = json.loads((out / "ranks.json").read_text())
    assert list(ranks["final"].values()) == [2] * LINEAR_MODULES
    assert ranks["history"] == []
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    # A checkpoint at every tenth of the run, here every step, has all up to it logged.
    assert [event["event"] for event in events] == ["start", "evaluation", *["step"] * 6, "evaluation", "end"]
    assert events[1]["accuracy"] == metrics["before"]
    assert events[-2]["accuracy"] == metrics["after"]
    assert (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").exists()


def test_the_written_recipe_trains_the_same_run_again(trained: Path, tmp_path: Path) -> None:
    result = command("train", trained / "out" / "recipe.yaml", f"output={tmp_path / 'again'}", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output == ""
    first, second = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (trained / "out", tmp_path / "again")
    )
    assert first == second
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["scores"] == metrics_of(trained)["scores"]


def test_progress_and_summary_are_printed(recipe: Path) -> None:
    result = command("train", recipe, "train.max_steps=10", "train.eval_every=never")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert sum(line.startswith("step ") and "rank 26" in line and "samples/s" in line for line in lines) >= 8
    for words in ("before training:", "accuracy before", "accuracy after", "share of the model", "peak memory"):
        assert words in result.stdout


def test_evaluate_gives_exactly_the_same_score_in_a_new_process(trained: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ranktune", "evaluate", str(trained / "out"), "--json"],
        capture_output=True, text=True, check=True, cwd=trained,
    )  # fmt: skip
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    assert printed["value"] == metrics_of(trained)["after"]
    assert printed["scores"] == metrics_of(trained)["scores"]["after"]


def test_evaluate_prints_scores_beside_the_recorded_ones(trained: Path, tmp_path: Path) -> None:
    result = command("evaluate", trained / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    shown = next(line for line in result.stdout.splitlines() if "accuracy" in line)
    assert shown.count(f"{metrics_of(trained)['after']:.4f}") == 2
    # Every score has its own beside it: here the recorded ones are made up, to tell them from the new ones.
    shutil.copytree(trained / "out", tmp_path / "out")
    metrics = metrics_of(trained)
    made_up = {name: number + 7 for number, name in enumerate(metrics["scores"]["after"])}
    (tmp_path / "out" / "metrics.json").write_text(
        json.dumps({**metrics, "scores": {**metrics["scores"], "after": made_up}})
    )
    table = command("evaluate", tmp_path / "out").stdout
    for name, value in made_up.items():
        (line,) = [line for line in table.splitlines() if f" {name.replace('_', ' ')} " in line]
        assert f"{value:.4f}" in line
        assert f"{metrics['scores']['after'][name]:.4f}" in line
    assert json.loads(command("evaluate", tmp_path / "out", "--json").stdout)["recorded"] == made_up
    train_split = command("evaluate", trained / "out", "--split", "train", "--json")
    assert json.loads(train_split.stdout)["scores"] != metrics_of(trained)["scores"]["after"]


def test_evaluate_says_when_the_data_changed(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "out", tmp_path / "out")
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    recipe["data"]["source"] = str(write_data(tmp_path / "data", rows=64))
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = command("evaluate", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "fingerprint changed" in result.stderr


def test_plot_draws_the_pictures_again(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "out", tmp_path / "out")
    pictures = sorted((tmp_path / "out").glob("*.png"))
    before = [picture.read_bytes() for picture in pictures]
    for picture in pictures:
        picture.unlink()
    result = command("plot", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [picture.read_bytes() for picture in pictures] == before
    assert all(picture.name in result.stdout for picture in pictures)


def test_dry_run_needs_no_weights_and_writes_nothing(recipe: Path) -> None:
    (recipe.parent / "model" / "model.safetensors").unlink()
    found = sorted(recipe.parent.rglob("*"))
    result = command("train", recipe, "method.name=dora", "--dry-run")
    assert result.exit_code == 0, result.output
    assert sorted(recipe.parent.rglob("*")) == found
    printed, table = result.stdout.split("Modules to adapt")
    assert yaml.safe_load(printed)["method"]["name"] == "dora"
    assert "bert.encoder.layer.1.attention.self.query" in table
    # dora of rank 2 on 16 x 16: 2 * (16 + 16) + 16; all: 2 layers of (4 square, 2 of 16 x 32) and the pooler.
    square, up, down = 2 * 32 + 16, 2 * 48 + 32, 2 * 48 + 16
    assert f"{2 * (4 * square + up + down) + square:,}" in table
    assert f"{LINEAR_MODULES} modules" in table


def test_dry_run_counts_what_training_then_trains(trained: Path) -> None:
    shown = " ".join(command("train", trained / "recipe.yaml", "--dry-run").stdout.split())
    metrics = metrics_of(trained)
    assert f"{metrics['trainable_params']:,} trainable parameters" in shown
    assert f"({metrics['active_params']:,} in the adapter" in shown
    assert f"of the model's {metrics['total_params']:,}" in shown


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.target_modules=[query, vlaue]", ["'method.target_modules'", "'vlaue'", "Did you mean 'value'?"]),
        ("method.target_modules=[LayerNorm]", ["'LayerNorm'", "is no linear layer", "query"]),
        ("method.target_modules=query", ["regular expression", "Did you mean 'query'?", "list"]),
        ("method.target_modules='*query'", ["not a regular expression"]),
        ("method.exclude_modules=[poler]", ["'method.exclude_modules'", "Did you mean 'pooler'?"]),
        ("method.modules_to_save=[classifer]", ["'method.modules_to_save'", "Did you mean 'classifier'?"]),
        ("method.rank_pattern={qurey: 4}", ["'method.rank_pattern'", "Did you mean 'query'?"]),
        (
            "method={name: lora, target_modules: [query], layers_to_transform: [7]}",
            ["'method.layers_to_transform'", "numbered 0 to 1"],
        ),
        ("method={name: lora, target_modules: [query], exclude_modules: [query]}", ["section 'method'"]),
        ("method.name=dorra", ["'method.name'", "Did you mean 'dora'?"]),
        ("method.r=0", ["r=0", "at least 1"]),
        ("train.epoch=1", ["'train.epoch'", "Did you mean 'train.epochs'?"]),
        ("train.precision=fp16", ["'train.precision'", "needs a GPU"]),
        ("train.trainer.dataloader_prefetch_factor=2", ["section 'train'", "dataloader_prefetch_factor"]),
        ("data.task=clasification", ["data.task", "Did you mean 'classification'?"]),
        ("data.columns.txet=text", ["data.columns", "Did you mean 'text'?"]),
        ("data.metric=acuracy", ["data.metric", "Did you mean 'accuracy'?"]),
        ("model=all-minillm", ["model", "Did you mean 'all-minilm'?"]),
        ("model=no/such/place/at/all", ["model", "no/such/place/at/all"]),
        ("model=no-such/hub-model", ["model", "no-such/hub-model"]),
        ("output=recipe.yaml", ["output", "is a file"]),
    ],
)
def test_mistakes_are_refused_before_the_weights_are_read(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: list[str]
) -> None:
    if override == "train.precision=fp16":
        import torch

        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.chdir(recipe.parent)
    (recipe.parent / "model" / "model.safetensors").unlink()  # reading it would be another error
    message = refused("train", recipe, override)
    for word in words:
        assert word in message
    assert not (recipe.parent / "out").exists()


def test_missing_data_and_recipe_are_refused(recipe: Path) -> None:
    message = refused("train", recipe.with_name("recipe.yml"))
    assert "Did you mean 'recipe.yaml'?" in message
    shutil.rmtree(recipe.parent / "data")
    assert str(recipe.parent / "data") in refused("train", recipe)


def test_lost_weights_are_refused_with_the_model_named(recipe: Path) -> None:
    (recipe.parent / "model" / "model.safetensors").unlink()
    assert "the weights of" in refused("train", recipe)
    assert not (recipe.parent / "out").exists()


def test_debug_adds_the_traceback(recipe: Path) -> None:
    result = command("train", recipe, "train.epoch=1", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "'train.epoch'" in result.stderr


def test_a_run_is_replaced_only_on_request(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    recipe, out = write_recipe(tmp_path, method={"name": "dora"}), tmp_path / "out"
    (out / "notes.txt").write_text("mine")
    before = (out / "metrics.json").read_bytes()
    message = refused("train", recipe)
    assert "already holds a run" in message
    assert "--overwrite" in message
    # Also when the run did not finish: its checkpoints are worth something.
    (out / "metrics.json").rename(out / "kept.json")
    assert "already holds a run" in refused("train", recipe)
    (out / "kept.json").rename(out / "metrics.json")
    # A refused replacement must not cost the old run.
    assert "vlaue" in refused("train", recipe, "method.target_modules=[vlaue]", "--overwrite")
    assert (out / "metrics.json").read_bytes() == before
    result = command("train", recipe, "--overwrite", "--quiet")
    assert result.exit_code == 0, result.output
    assert metrics_of(tmp_path)["method"] == "dora"
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["evaluate", "plot"])
def test_directories_without_a_finished_run_are_refused(trained: Path, tmp_path: Path, command: str) -> None:
    assert "there is no directory" in refused(command, tmp_path / "nowhere")
    assert "holds no run" in refused(command, tmp_path)
    shutil.copytree(trained / "out", tmp_path / "torn")
    (tmp_path / "torn" / "metrics.json").unlink()
    (tmp_path / "torn" / "ranks.json").unlink()
    assert "did not finish" in refused(command, tmp_path / "torn")


def test_interruption_and_unexpected_errors_have_their_own_codes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ranktune.training

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranktune.training, "train", interrupt)
    result = command("train", recipe)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(ranktune.training, "train", fail)
    result = command("train", recipe)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "ranktune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ranktune 0.1.0"


def test_no_help_loses_what_is_in_brackets() -> None:
    """Rich takes [word] for markup, and drops it."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    seen = []
    for name, one in {"": group, **group.commands}.items():
        written = [one.help or "", *(getattr(parameter, "help", None) or "" for parameter in one.params)]
        shown = re.sub(r"[\s│]+", "", CliRunner(env={"COLUMNS": "300"}).invoke(app, [*name.split(), "--help"]).output)
        for text in written:
            for bracketed in re.findall(r"\w*\\?\[[^\]]*\]", text):
                if not bracketed.endswith("bold]"):
                    seen.append(bracketed)
                    assert re.sub(r"[\s\\]", "", bracketed) in shown, f"{name} --help loses {bracketed}"
    assert len(seen) >= 3


def test_a_dry_run_shows_every_key_also_where_the_data_cannot_be_read(recipe: Path) -> None:
    (recipe.parent / "data" / "train.csv").write_text('text,label\n"no end,colour\n')
    result = command("train", recipe, "--dry-run")
    assert result.exit_code == 2
    assert "quoting: true" in result.stdout
    assert "learning_rate:" in result.stdout


def test_a_dry_run_tells_the_start_the_room_and_the_end(recipe: Path) -> None:
    result = command("train", recipe, "method={name: increlora, r: 2, max_r: 8, grow_interval: 1, warmup_ratio: 0.0}",
                 "train.epochs=4", "--dry-run")  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    # A 16 x 16 layer: 33 numbers a component, one of them at the start, room for eight.
    assert re.search(r"16 x 16 │ 1 │ 33 │ 264 │", shown)
    assert f"starts at total rank {LINEAR_MODULES} with " in shown
    assert f"Its ranks are moved to total rank {2 * LINEAR_MODULES} at the end." in shown
    budget = ["method={name: dynamic-dora, r: 2, target_params: 900, prune_interval: 2}", "train.epochs=4"]
    assert "moved to at most 900 parameters in components at the end" in " ".join(
        command("train", recipe, *budget, "--dry-run").stdout.split()
    )
    assert "at the end" not in command("train", recipe, "--dry-run").stdout


def test_the_card_of_an_adapter_has_no_path_of_this_machine(trained: Path) -> None:
    card = (trained / "out" / "adapter" / "README.md").read_text()
    metrics = metrics_of(trained)
    assert str(trained) not in card
    assert "a model in a local folder named `model`" in card
    assert f"| ranks | 2 in {LINEAR_MODULES} modules, {2 * LINEAR_MODULES} in total |" in card
    assert f"{metrics['before']:.4f} before, {metrics['after']:.4f} after" in card
    assert 'AutoModelForSequenceClassification.from_pretrained("path/of/the/base/model", num_labels=2)' in card
    assert "import peft, ranktune" in card


def test_inspect_lists_modules_in_the_order_of_the_model_and_counts_as_the_summary(trained: Path) -> None:
    metrics, final = metrics_of(trained), json.loads((trained / "out" / "ranks.json").read_text())["final"]
    found = json.loads(command("inspect", trained / "out", "--json").stdout)
    assert list(found["modules"]) == list(final) != sorted(final)
    assert found["adapter_parameters"] == metrics["active_params"]
    shown = command("inspect", trained / "out").stdout
    head = metrics["trainable_params"] - metrics["active_params"]
    assert f"{metrics['active_params']:,} parameters in the adapter, {head} trained in full beside it" in shown
