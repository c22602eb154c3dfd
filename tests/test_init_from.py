"""`method.init_from` in a recipe: a run that starts from a saved adapter, its resumes, and what is refused early."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import Result

from ranktune.recipe import load_recipe
from tests.command_line import command
from tests.tiny import LINEAR_MODULES, write_everything

METHODS = {
    "lora": ("lora", "{name: lora, lora_dropout: 0.1}"),
    "dora": ("lora", "{name: dora, lora_dropout: 0.1}"),
    "dora from dora": ("dora", "{name: dora}"),
    "dynamic-dora": ("lora", "{name: dynamic-dora, r: 2, prune_interval: 2}"),
    "increlora": ("even", "{name: increlora, r: 3, grow_by: 1, grow_interval: 3}"),
    "dylora": ("lora", "{name: dylora}"),
}


def refused(*arguments: object) -> str:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its data, and stock PEFT's adapters for it: uneven ranks, even ones, a DoRA."""
    folder = tmp_path_factory.mktemp("place")
    write_everything(folder)
    uneven = {"rank_pattern": {"layer.1.*query": 5, "output.dense": 2}, "alpha_pattern": {"query": 7}}
    for name, fields in {"lora": uneven, "even": {}, "dora": {**uneven, "use_dora": True}}.items():
        torch.manual_seed(3)
        base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
        config = peft.LoraConfig(
            r=3, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False, **fields
        )
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter.mul_(1.0 + 0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def train(place: Path, out: Path, method: str, *overrides: str) -> Result:
    source, section = METHODS[method]
    started = f"method={section[:-1]}, init_from: {place / source}}}"
    result = command(
        "train", place / "recipe.yaml", started, f"output={out}", "train.epochs=2", "train.save_every=2",
        "train.save_total_limit=null", "train.learning_rate=0.003", *overrides,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result


def tensors(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_starts_from_it_and_resumes_to_the_bit(place: Path, tmp_path: Path, method: str) -> None:
    result = train(place, tmp_path / "whole", method)
    source = METHODS[method][0]
    kind = "dora" if source == "dora" else "lora"
    assert f"starting from {place / source} ({kind}), trained on {place / 'model'}" in result.stdout
    before = json.loads((tmp_path / "whole" / "metrics.json").read_text())["scores"]["before"]
    assert before["loss"] == pytest.approx(loss_in_stock_peft(place, place / source), abs=1e-6)
    # As if it had been killed after step 9, and the adapter thrown away since.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in range(10, 14, 2):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"checkpoint-{step}")
    for gone in ("metrics.json", "ranks.json"):
        (tmp_path / "killed" / gone).unlink()
    shutil.rmtree(tmp_path / "killed" / "adapter")
    (place / source).rename(place / "away")
    try:
        resumed = command("train", "--resume", tmp_path / "killed")
        scored = command("evaluate", tmp_path / "killed")
    finally:
        (place / "away").rename(place / source)
    assert resumed.exit_code == scored.exit_code == 0, resumed.output + scored.output
    assert "going on from checkpoint-8" in resumed.stdout
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")
    scores = [json.loads((tmp_path / name / "metrics.json").read_text())["scores"] for name in ("killed", "whole")]
    assert scores[0] == scores[1]


def loss_in_stock_peft(place: Path, adapter: Path) -> float:
    """The evaluation loss as stock libraries compute it, without ranktune's data and training code."""
    transformers.set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rows = [line.rsplit(",", 1) for line in (place / "data" / "validation.csv").read_text().splitlines()[1:]]
    labels = torch.tensor([["animal", "colour"].index(label) for _, label in rows])
    batch = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        return float(model(**batch, labels=labels).loss)


def test_ranks_and_scales_are_written_out(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml", [f"method={{name: lora, init_from: {place / 'lora'}}}"])
    method = recipe.method
    assert (method["r"], method["lora_alpha"]) == (3, 4)
    stored = json.loads((place / "lora" / "adapter_config.json").read_text())
    assert len(method["target_modules"]) == LINEAR_MODULES
    assert sorted(method["rank_pattern"].values()) == [2] * 4 + [5]
    assert sorted(method["alpha_pattern"].values()) == [7, 7]
    assert set(method["modules_to_save"]) <= set(stored["modules_to_save"])
    plan = command("train", place / "recipe.yaml", f"method={{name: lora, init_from: {place / 'lora'}}}", "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert f"init_from: {place / 'lora'}" in plan.stdout
    # What is written out is complete, and loads again.
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(yaml.safe_dump(recipe.resolved()))
    assert load_recipe(resolved) == recipe


def test_places_may_be_relative_and_in_the_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("ADAPTERS", str(place))
    for text in ("lora", "${ADAPTERS}/lora"):
        recipe = load_recipe(place / "recipe.yaml", [f"method={{name: lora, init_from: '{text}'}}"])
        assert recipe.method["init_from"] == str(place / "lora")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: lora, init_from: nowhere}", "nowhere does not exist"),
        ("{name: lora, init_from: 3}", "'method.init_from' is 3; name the folder"),
        ("{name: lora, r: 5, init_from: '{place}/even'}", "r=5 contradicts init_from"),
        (
            "{name: lora, target_modules: all-linear, init_from: '{place}/even'}",
            "'method.target_modules' is decided by",
        ),
        ("{name: lora, init_from: '{place}/dora'}", "is a DoRA: its magnitudes"),
        ("{name: mor, init_from: '{place}/even'}", "cannot be where mor starts"),
        ("{name: increlora, r: 8, init_from: '{place}/lora'}", "increlora starts all of them at one"),
        ("{name: increlora, r: 2, init_from: '{place}/even'}", "to a mean rank of r=2: set r above 3"),
        ("{name: dynamic-dora, init_from: '{place}/even'}", "to a mean rank of r=8: set r below 3"),
        ("{name: dynamic-dora, r: none, init_from: '{place}/even'}", "r='none' must be a whole number"),
        ("{name: peft-lora, init_from: '{place}/even'}", "'peft-lora' is none of them"),
        ("{name: full, init_from: '{place}/even'}", "'full' is none of them"),
        ("{name: lora, init_fron: '{place}/even'}", "unknown key 'method.init_fron'"),
    ],
)
def test_what_cannot_be_a_start_is_refused_while_the_recipe_is_read(
    place: Path, tmp_path: Path, method: str, message: str
) -> None:
    began = time.perf_counter()
    text = method.replace("{place}", str(place))
    assert message in refused("train", place / "recipe.yaml", f"method={text}", f"output={tmp_path / 'out'}")
    assert time.perf_counter() - began < 2.0
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused_before_its_weights_are_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranktune.training.pretrained", lambda *_: pytest.fail("weights were loaded"))
    start = f"method={{name: lora, init_from: {place / 'even'}}}"
    shutil.copytree(place / "model", tmp_path / "wider")
    config = json.loads((tmp_path / "wider" / "config.json").read_text())
    (tmp_path / "wider" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    said = refused("train", place / "recipe.yaml", start, f"model={tmp_path / 'wider'}", f"output={tmp_path / 'out'}")
    assert "maps 16 features to 48 there, and the adapter's factors 16 to 32" in said
    (tmp_path / "wider" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    said = refused("train", place / "recipe.yaml", start, f"model={tmp_path / 'wider'}", f"output={tmp_path / 'out'}")
    assert "6 of its 13 modules are not there, such as bert.encoder.layer.1" in said
    assert f"it was trained on '{place / 'model'}'" in said


def test_an_adapter_that_has_changed_since_is_noticed(place: Path, tmp_path: Path) -> None:
    """A resolved recipe that is trained anew has what the adapter decided then."""
    train(place, tmp_path / "out", "increlora", "train.max_steps=12")
    moved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    moved["method"]["init_from"] = str(place / "lora")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(moved))
    said = refused("train", tmp_path / "again.yaml", f"output={tmp_path / 'other'}")
    assert "increlora starts all of them at one" in said
    moved["method"] |= {"name": "increlora", "init_from": str(place / "even"), "alpha_pattern": {"query": 9}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(moved))
    said = refused("train", tmp_path / "again.yaml", f"output={tmp_path / 'other'}")
    assert "alpha_pattern={'query': 9} contradicts init_from" in said


def test_a_field_that_was_taken_out_of_a_resolved_recipe_is_noticed(place: Path, tmp_path: Path) -> None:
    resolved = load_recipe(place / "recipe.yaml", [f"method={{name: lora, init_from: {place / 'lora'}}}"]).resolved()
    resolved["method"]["alpha_pattern"] = {}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(resolved))
    said = refused("train", tmp_path / "again.yaml", f"output={tmp_path / 'other'}")
    assert "'method.alpha_pattern' is {}, and the adapter in 'method.init_from' now has {" in said


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_from_the_adapter_again(
    place: Path, tmp_path: Path
) -> None:
    train(place, tmp_path / "out", "lora", "train.max_steps=4")
    expected = tensors(tmp_path / "out")
    for folder in ("checkpoints", "adapter"):
        shutil.rmtree(tmp_path / "out" / folder)
    (tmp_path / "out" / "metrics.json").unlink()
    (place / "lora").rename(place / "away")
    try:
        assert "does not exist" in refused("train", "--resume", tmp_path / "out")
    finally:
        (place / "away").rename(place / "lora")
    result = command("train", "--resume", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "the run starts anew, from step 0" in result.stdout
    assert tensors(tmp_path / "out") == expected


def test_a_comparison_and_a_resume_do_not_take_another_start(place: Path, tmp_path: Path) -> None:
    started = f"method={{name: lora, init_from: {place / 'even'}}}"
    assert "'method.init_from' keeps the ranks" in refused("compare", place / "recipe.yaml", started)
    train(place, tmp_path / "out", "lora")
    said = refused("train", "--resume", tmp_path / "out", f"method.init_from={place / 'even'}")
    assert "method.init_from" in said
