"""`ranktune evaluate OUT --adapter DIR`: what was made of a run, or something else, scored in its adapter's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.command_line import command
from tests.tiny import write_everything, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of lora, that has learned something."""
    folder = tmp_path_factory.mktemp("run")
    write_everything(folder)
    recipe = write_recipe(folder, method={"name": "lora", "r": 4}, train={"epochs": 6})
    assert command("train", recipe, "--quiet").exit_code == 0
    return folder


def scored(run: Path, adapter: Path) -> dict[str, float]:
    done = command("evaluate", run / "out", "--adapter", adapter, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["adapter"] == str(adapter)
    assert found["recorded"] == json.loads((run / "out" / "metrics.json").read_text())["scores"]["after"]
    return found["scores"]


def loss_in_stock_peft(run: Path, adapter: Path) -> float:
    """The evaluation loss as stock libraries compute it."""
    base = AutoModelForSequenceClassification.from_pretrained(run / "model", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    rows = [line.rsplit(",", 1) for line in (run / "data" / "validation.csv").read_text().splitlines()[1:]]
    labels = torch.tensor([["animal", "colour"].index(label) for _, label in rows])
    batch = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        return float(model(**batch, labels=labels).loss)


@pytest.mark.usefixtures("here")
def test_what_was_made_of_a_run_is_scored(run: Path) -> None:
    """By the command that says where it was saved; a squeezed one as stock PEFT computes it."""
    made = {
        "squeezed": command("squeeze", run / "out", "--budget", "rank=6"),
        "exported": command("export", run / "out"),
        "merged": command("merge", run / "out", "--out", run / "merged"),
    }
    own = json.loads((run / "out" / "metrics.json").read_text())["scores"]["after"]
    for kind, done in made.items():
        assert done.exit_code == 0, done.output
        words = done.stdout.strip().splitlines()[-1].split("Score it: ranktune ")[1].split()
        assert words[:3] == ["evaluate", str(run / "out"), "--adapter"]
        scores = scored(run, Path(words[3]))
        if kind == "squeezed":
            assert scores["loss"] == pytest.approx(loss_in_stock_peft(run, Path(words[3])), abs=1e-5)
            assert abs(scores["loss"] - own["loss"]) > 1e-3
        else:
            assert scores["loss"] == pytest.approx(own["loss"], abs=1e-5)
    done = command("evaluate", run / "out", "--adapter", run / "merged")
    assert "after training" in done.stdout
    assert "with " in done.stdout


def test_another_run_of_the_same_base(run: Path, tmp_path: Path) -> None:
    recipe = write_recipe(run, method={"name": "mor", "r": 2}, train={"epochs": 2}, output=str(tmp_path / "mor"))
    assert command("train", recipe, "--quiet").exit_code == 0
    own = json.loads((tmp_path / "mor" / "metrics.json").read_text())["scores"]["after"]
    assert scored(run, tmp_path / "mor") == pytest.approx(own, abs=1e-6)


def test_what_does_not_belong_there_is_refused(run: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = command("evaluate", run / "out", *arguments)
        assert done.exit_code == 2, done.output
        return done.stderr

    assert "does not exist" in refused("--adapter", tmp_path / "nowhere")
    assert "adapter_config.json does not exist" in refused("--adapter", run / "data")
    assert "is of BertModel, and the run's model is a BertForSequenceClassification" in refused(
        "--adapter", run / "model"
    )
    assert "leave --adapter out" in refused("--adapter", run / "out", "--ranks", "all")
    plain = tmp_path / "plain"
    shutil.copytree(run / "out" / "adapter", plain)
    file = plain / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "classifier" not in name}, file)
    assert "lacks classifier.bias, which the run trained in full" in refused("--adapter", plain)
    wider = {name: tensor.repeat(1, 2) if name.endswith("lora_A") else tensor for name, tensor in tensors.items()}
    save_file(wider, file)
    assert "maps 16 features to" in refused("--adapter", plain)
    file.write_bytes(file.read_bytes()[:-9])
    assert "torn" in refused("--adapter", plain)
    whole = tmp_path / "whole"
    AutoModelForSequenceClassification.from_pretrained(run / "model").save_pretrained(whole)
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "model.safetensors is truncated or altered" in refused("--adapter", whole)
