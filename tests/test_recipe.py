"""A recipe is read strictly: what it refuses, how it says so, and that the complete one loads back unchanged."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ranktune.errors import ConfigError, RanktuneError, RecipeError
from ranktune.recipe import DataRecipe, TrainRecipe, load_recipe, recipe_text
from ranktune.recipe.yaml_text import parse, write

MINIMAL = "model: all-minilm\nmethod: {name: lora, r: 4}\noutput: out\n"


def write_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str = MINIMAL, overrides: list[str] | None = None) -> str:
    with pytest.raises(RanktuneError) as caught:
        load_recipe(write_file(folder, text), overrides or [])
    return str(caught.value)


def test_defaults_are_written_out(tmp_path: Path) -> None:
    recipe = load_recipe(write_file(tmp_path, MINIMAL))
    resolved = recipe.resolved()
    assert resolved["method"]["r"] == 4
    assert resolved["method"]["target_modules"] == "all-linear"
    assert resolved["method"]["lora_dropout"] == 0.0
    assert set(resolved["data"]) == set(DataRecipe.model_fields)
    assert set(resolved["train"]) == set(TrainRecipe.model_fields)
    assert resolved["train"]["save_every"] == 0.1


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL,
        "method: dora\ndata: {labels: ['no', 'yes', 1], columns: {text: body}, delimiter: '\\t'}\n",
        "method: {name: dora, rank_pattern: {query: 2}, target_modules: [query, value]}\n"
        "train: {learning_rate: 1e-5, eval_every: 0.25, early_stopping_patience: 2, report_to: none,"
        " trainer: {adam_beta2: 0.95, run_name: '1e-3'}}\n",
    ],
)
def test_the_complete_recipe_loads_back_to_the_same_recipe(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write_file(tmp_path, text))
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(recipe))
    assert load_recipe(again) == recipe
    assert recipe_text(load_recipe(again)) == recipe_text(recipe)
    # Other programs read it with plain YAML 1.1: they must see the same values.
    assert yaml.safe_load(recipe_text(recipe)) == recipe.resolved()


def test_local_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_file(tmp_path, "method: lora\ndata: {source: texts.csv}\nmodel: some/hub-name\n"))
    assert recipe.data.source == str(tmp_path / "texts.csv")
    assert recipe.model == "some/hub-name"
    assert recipe.output == "runs/recipe"


@pytest.mark.parametrize(
    ("line", "key", "fix"),
    [
        ("modle: x", "modle", "model"),
        ("trian: {epochs: 1}", "trian", "train"),
        ("train: {epoch: 1}", "train.epoch", "train.epochs"),
        ("train: {lr: 1}", "train.lr", "train.learning_rate"),
        ("train: {per_device_train_batch_size: 1}", "train.per_device_train_batch_size", "train.batch_size"),
        ("learning_rate: 1", "learning_rate", "train.learning_rate"),
        ("data: {sauce: x}", "data.sauce", "data.source"),
        ("data: {max_lenght: 3}", "data.max_lenght", "data.max_length"),
        ("train: {trainer: {adam_beta_1: 0.8}}", "train.trainer.adam_beta_1", "train.trainer.adam_beta1"),
    ],
)
def test_unknown_keys_are_refused_with_the_closest_known_one(tmp_path: Path, line: str, key: str, fix: str) -> None:
    message = refusal(tmp_path, MINIMAL + line)
    assert "recipe.yaml" in message
    assert f"'{key}'" in message
    assert f"Did you mean '{fix}'?" in message


@pytest.mark.parametrize(
    ("method", "key", "fix"),
    [
        ("{name: lorra}", "method.name", "'lora'"),
        ("doora", "method.name", "'dora'"),
        ("{r: 8}", "method.name", "Methods: "),
        ("{name: lora, lora_apha: 8}", "method.lora_apha", "'method.lora_alpha'"),
        ("{name: lora, rank: 8}", "method.rank", "Known keys: r,"),
        ("{name: lora, task_type: SEQ_CLS}", "method.task_type", "set by the run"),
        ("{name: lora, r: 0}", "r=0", "at least 1"),
        ("{name: lora, r: '8'}", "r='8'", "whole number"),
        ("{name: dora, lora_dropout: 2}", "lora_dropout=2", "[0, 1)"),
    ],
)
def test_methods_are_checked_against_their_configuration(tmp_path: Path, method: str, key: str, fix: str) -> None:
    message = refusal(tmp_path, f"method: {method}\n")
    assert key in message
    assert fix in message


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("train: {epochs: '3'}", "train.epochs", "not '3'"),
        ("train: {epochs: yes}", "train.epochs", "not 'yes'"),
        ("train: {batch_size: 1.5}", "train.batch_size", "not 1.5"),
        ("train: {batch_size: 0}", "train.batch_size", "greater than 0"),
        ("train: {gradient_checkpointing: 1}", "train.gradient_checkpointing", "not 1"),
        ("train: {precision: bf61}", "train.precision", "Did you mean 'bf16'?"),
        ("train: {warmup_ratio: 1}", "train.warmup_ratio", "less than 1"),
        ("train: {eval_every: 0}", "train.eval_every", '"epoch"'),
        ("train: {eval_every: true}", "train.eval_every", '"epoch"'),
        ("train: {save_every: 1.0}", "train.save_every", '"never"'),
        ("train: {optimizer: adamw}", "train.optimizer", "Did you mean 'adamw_"),
        ("train: {lr_scheduler: cosin}", "train.lr_scheduler", "Did you mean 'cosine'?"),
        ("train: {report_to: wandbb}", "train.report_to", "Did you mean 'wandb'?"),
        ("train: {early_stopping_patience: 2, eval_every: never}", "train", "needs evaluations"),
        ("train: {early_stopping_patience: 2, save_every: 10}", "train", "leave save_every out"),
        ("train: {base_dtype: bf16}", "train", "precision: bf16"),
        ("train: {trainer: {learning_rate: 1}}", "train.trainer.learning_rate", "set 'train.learning_rate'"),
        ("train: {trainer: {disable_tqdm: false}}", "train.trainer.disable_tqdm", "remove it"),
        ("train: 3", "train", "not 3"),
        ("data: {labels: [true]}", "data.labels.0", "not True"),
        ("data: {evaluation_fraction: 1.5}", "data.evaluation_fraction", "less than 1"),
    ],
)
def test_impossible_values_are_refused_by_name(tmp_path: Path, line: str, key: str, words: str) -> None:
    message = refusal(tmp_path, MINIMAL + line)
    assert f"'{key}'" in message
    assert words in message


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "train: {epoch: 1, batch_size: 0}\ndata: {sauce: x}\n")
    assert all(key in message for key in ("'train.epoch'", "'train.batch_size'", "'data.sauce'"))
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- model\n", "key: value"),
        ("model: [a\n", "not valid YAML"),
        ("model: a\nmethod: lora\nmodel: b\n", "line 3: the key 'model' is already set on line 1"),
        ("method: lora\ntrain:\n  seed: 1\n  seed: 2\n", "the key 'seed' is already set"),
        ("method: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("? [a]\n: b\n", "a key must be a word"),
        ("model: all-minilm\n", "'method' is missing"),
        ("method: lora\n3: x\n", "'3'"),
    ],
)
def test_texts_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    message = refusal(tmp_path, text)
    assert "recipe.yaml" in message
    assert words in message


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write_file(tmp_path, MINIMAL)
    with pytest.raises(RecipeError, match=r"no recipe file .*Did you mean 'recipe\.yaml'"):
        load_recipe(tmp_path / "recipie.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    path = write_file(tmp_path, "method: lora\ntrain: {epochs: 3, batch_size: 8}\n")
    recipe = load_recipe(
        path,
        ["train.epochs=0.5", "train.learning_rate=1e-4", "method.r=2", "data.columns.text=a=b", "data.labels=[no, 1]"],
    )
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.batch_size) == (0.5, 1e-4, 8)
    assert recipe.method["r"] == 2
    assert recipe.data.columns == {"text": "a=b"}
    assert recipe.data.labels == ["no", "1"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=1", "'train.epoch' (set on the command line). Did you mean 'train.epochs'?"),
        ("train.epochs=many", "'train.epochs' (set on the command line)"),
        ("train.epochs", "write key=value"),
        ("train..epochs=1", "write key=value"),
        ("=1", "write key=value"),
        ("train.epochs=[", "cannot be read"),
        ("output.place=x", "'output.place=x': output is 'out', which has no keys inside"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(tmp_path, overrides=[override])


def test_config_errors_name_the_file_and_the_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml: section 'method': r=-1"):
        load_recipe(write_file(tmp_path, "method: {name: dora, r: -1}\n"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("yes", "yes"), ("off", "off"), ("true", True),
     ("1_000", 1000), ("e3", "e3"), ("1.2.3", "1.2.3"), ("-", [None]), ("2024-01-01x", "2024-01-01x")],
)  # fmt: skip
def test_numbers_and_words_are_read_as_in_yaml_1_2(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize("word", ["1e-3", "yes", "true", "null", "1.5", "0x1f", ".inf", "~", "3", ""])
def test_words_that_look_like_values_stay_words(word: str) -> None:
    assert parse(write({"x": word})) == {"x": word} == yaml.safe_load(write({"x": word}))


def test_every_friendly_key_exists_in_trainer() -> None:
    """The table that sends TrainingArguments names to their recipe keys must know both sides."""
    from transformers import TrainingArguments

    from ranktune.recipe.choices import _DECIDED_BY_THE_RUN, _FRIENDLY
    from ranktune.recipe.schema import KNOWN_ELSEWHERE, SECTIONS

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(_FRIENDLY) | _DECIDED_BY_THE_RUN <= fields
    keys = {f"{part}.{name}".lstrip(".") for part, model in SECTIONS.items() for name in model.model_fields}
    targets = {*_FRIENDLY.values(), *KNOWN_ELSEWHERE.values()}
    assert {key for key in targets if not key.startswith("method.")} <= keys


def test_a_mistyped_key_is_refused_without_heavy_imports(tmp_path: Path) -> None:
    path = write_file(tmp_path, MINIMAL + "modle: x\n")
    code = (
        "import sys\nfrom ranktune.recipe import load_recipe\nfrom ranktune.errors import RecipeError\n"
        f"try:\n    load_recipe({str(path)!r})\nexcept RecipeError:\n"
        "    print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_places_may_stand_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    monkeypatch.delenv("MY_DATE", raising=False)
    (tmp_path / "texts.csv").write_text("text,label\n")
    text = "method: lora\nmodel: ${MY_DATA}/model\ndata: {source: '${MY_DATA}/texts.csv'}\noutput: ${MY_DATA}/out\n"
    recipe = load_recipe(write_file(tmp_path, text))
    places = recipe.model, recipe.data.source, recipe.output
    assert places == (str(tmp_path / "model"), str(tmp_path / "texts.csv"), str(tmp_path / "out"))
    # What is written down is the place itself: the run can be repeated without the variable.
    assert "MY_DATA" not in recipe_text(recipe)
    # An override needs no variable, and a dollar is otherwise an ordinary character.
    message = refusal(tmp_path, text.replace("MY_DATA}/m", "MY_DATE}/m"))
    assert "'model' is '${MY_DATE}/model'" in message
    assert "environment variable MY_DATE is not set. Did you mean 'MY_DATA'?" in message
    assert "model=..." in message
    again = load_recipe(tmp_path / "recipe.yaml", ["model=some/$name"])
    assert again.model == "some/$name"


def test_what_is_replaced_cannot_be_nothing(tmp_path: Path) -> None:
    assert "data.replace.text" in refusal(tmp_path, MINIMAL + "data: {replace: {text: {'': x}}}\n")
    message = refusal(tmp_path, MINIMAL + "data: {loss_on: completions}\n")
    assert "Did you mean 'completion'?" in message
