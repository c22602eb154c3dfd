"""`ranktune squeeze`: what it says of updates and outputs, on runs and on folders that ranktune did not write."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertModel
from typer.testing import CliRunner

from ranktune.cli import app
from ranktune.errors import RecipeError
from ranktune.squeezed_run import budget_of, squeeze_trained
from tests.tiny import LINEAR_MODULES, write_everything, write_model, write_recipe


def command(*arguments):
    return CliRunner().invoke(app, ["squeeze", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of lora."""
    folder = tmp_path_factory.mktemp("run")
    write_everything(folder)
    recipe = write_recipe(folder, method={"name": "lora", "r": 4}, train={"max_steps": 6})
    done = CliRunner().invoke(app, ["train", str(recipe), "--quiet"])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A model folder, and a LoRA for it by stock PEFT that does not say where its base model is."""
    folder = tmp_path_factory.mktemp("stock")
    base = BertModel.from_pretrained(write_model(folder / "model"))
    base.name_or_path = ""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("rank=64", {"total_rank": 64}),
        ("params=100,000", {"target_params": 100_000}),
        ("energy=.5", {"energy": 0.5}),
        ("energy=90 %", {"energy": 0.9}),
    ],
)
def test_budgets_as_text(text, budget):
    assert budget_of(text) == budget


@pytest.mark.parametrize("text", ["", "64", "rank=", "rank=1.5", "ranks=3", "energy=much", "energy=0.5=",
    "rank=0", "rank=-3", "params=0", "energy=0", "energy=110%", "energy=nan"])  # fmt: skip
def test_texts_that_are_no_budget(text):
    with pytest.raises(RecipeError, match="rank=64"):
        budget_of(text)


def test_a_run_says_what_is_lost_in_its_outputs(run):
    """Proved by a process without ranktune, in the command itself."""
    done = command(run / "out", "--budget", f"rank={LINEAR_MODULES + 9}")
    assert done.exit_code == 0, done.output
    assert f"total rank {4 * LINEAR_MODULES} to {LINEAR_MODULES + 9}, " in done.output
    assert "on 16 examples of the evaluation split, in stock PEFT" in done.output
    folder = run / f"out-rank{LINEAR_MODULES + 9}"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")
    assert set(config["modules_to_save"]) == {"classifier", "score"}
    again = command(run / "out", "--budget", f"rank={LINEAR_MODULES + 9}")
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_a_run_whose_data_is_gone_is_squeezed_all_the_same(run, tmp_path):
    (run / "data").rename(run / "moved")
    try:
        result = squeeze_trained(run / "out", tmp_path / "small", {"energy": 0.9})
    finally:
        (run / "moved").rename(run / "data")
    assert result.loss is None
    assert "data" in str(result.unknown)
    assert sum(result.squeezed.ranks.values()) < 4 * LINEAR_MODULES


def test_a_folder_alone_is_squeezed_without_its_base_model(stock, tmp_path):
    done = command(stock / "adapter", "--budget", "rank=5", "--out", tmp_path / "small")
    assert done.exit_code == 0, done.output
    assert "total rank 12 to 5" in done.output
    assert "outputs were not compared: name the base model with --base" in done.output


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("energy", [0.7, 1.0])
def test_outputs_on_texts_of_ones_own(stock, tmp_path, energy):
    """As computed by hand, padding left out."""
    texts = ["red cat near the dog", "blue", "one two"]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "", "  "]))
    done = command(
        stock / "adapter", "--budget", f"energy={energy}", "--out", tmp_path / "small", "--base", stock / "model",
        "--texts", tmp_path / "texts.txt", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    loss = json.loads(done.output)["loss"]
    tokenizer = AutoTokenizer.from_pretrained(stock / "model")
    outputs = {}
    for name, adapter in (("none", None), ("before", stock / "adapter"), ("after", tmp_path / "small")):
        found = []
        for text in texts:
            model = AutoModel.from_pretrained(stock / "model").eval()
            if adapter is not None:
                model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
            with torch.no_grad():
                found.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state.flatten())
        outputs[name] = torch.cat(found)
    lost, effect = outputs["after"] - outputs["before"], outputs["before"] - outputs["none"]
    assert loss["share"] == pytest.approx(float(lost.norm() / effect.norm()), abs=1e-5)
    assert loss["difference"] == pytest.approx(float(lost.abs().max()), abs=1e-5)
    assert loss["effect"] == pytest.approx(float(effect.abs().max()), abs=1e-5)
    assert loss["inputs"] == "3 texts"
    assert (loss["share"] < 1e-5) == (energy == 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "texts.txt"], "name it with --base"),
        (["--base", "no/such/folder/anywhere"], "its base model cannot be found"),
        (["--base", "{stock}/model", "--texts", "{stock}/none.txt"], "none.txt cannot be read as text"),
        (["--base", "{stock}/model", "--texts", "{stock}/empty.txt"], "holds no text"),
        (["--budget", "rank=0"], "--budget 'rank=0': write rank=64 (all modules together, at least 1)"),
        (["--profile", "compact", "--budget", "much"], "write rank=64"),
    ],
)
def test_mistakes_leave_nothing_behind(stock, tmp_path, arguments, message):
    (stock / "empty.txt").write_text("\n\n")
    arguments = [argument.format(stock=stock) for argument in arguments]
    budget = [] if "--budget" in arguments else ["--budget", "rank=5"]
    done = command(stock / "adapter", *budget, "--out", tmp_path / "small", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_what_is_said_of_padding_and_of_too_large_a_budget(run, tmp_path):
    """The zeros that fill a uniform file up are in its size, and in a line of their own."""
    done = command(run / "out", "--budget", "rank=20", "--profile", "uniform", "--out", tmp_path / "even")
    assert done.exit_code == 0, done.output
    stored = sum(
        tensor.numel() for name, tensor in load_file(tmp_path / "even" / "adapter_model.safetensors").items()
        if ".lora_" in name
    )  # fmt: skip
    assert f"in the file the factors have {stored:,} numbers, with the zeros that the uniform profile" in done.output
    size = (tmp_path / "even" / "adapter_model.safetensors").stat().st_size
    assert f"to {size / 2**10:.1f} KiB" in done.output
    assert "nothing to squeeze" not in done.output
    done = command(run / "out", "--budget", "rank=999", "--out", tmp_path / "same", "--dtype", "bfloat16")
    assert f"nothing to squeeze: the budget is no less than this adapter has, total rank {4 * LINEAR_MODULES}" in (
        done.output
    )
    assert "in the file the factors have" not in done.output
    half = (tmp_path / "same" / "adapter_model.safetensors").stat().st_size
    assert half < (run / "out" / "adapter" / "adapter_model.safetensors").stat().st_size / 1.3


def test_outputs_are_left_alone_where_they_are_not_wanted(run, tmp_path):
    done = command(run / "out", "--budget", "params=500", "--out", tmp_path / "small", "--no-outputs")
    assert "outputs were not compared: as you asked" in done.output
    assert "left out, because they have rank 0" in done.output
