"""Entries of a configuration that have no effect: refused by name, in Python and in a recipe."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from typer.testing import CliRunner

import ranktune
from ranktune.cli import app
from ranktune.errors import ConfigError
from tests.methods import build_base
from tests.tiny import write_everything


def layered():
    """A base model with numbered layers."""
    base = build_base("Linear")
    base.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(3)])
    return base


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"(": 2}}, r"rank_pattern has the key '\(', not a regular expression"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform has \[7\], and the base model's layers .* 0 to 2"),
        ({"layers_to_transform": 3}, r"layers_to_transform has \[3\]"),
    ],
)
@pytest.mark.parametrize("config_class", [ranktune.RankConfig, ranktune.DyLoraConfig], ids=lambda c: c.__name__)
def test_in_python_it_is_refused_before_the_model_changes(config_class, fields, message):
    base = layered()
    names = list(base.state_dict())
    with pytest.raises(ConfigError, match=message):
        peft.get_peft_model(base, config_class(target_modules=["wide", "narrow", "0", "1", "2"], **fields))
    assert list(base.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT's, without a suggestion
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"wide": 2, "narow": 3}}, r"rank_pattern has \['narow'\].* Did you mean 'narrow'\?"),
        ({"alpha_pattern": {"other.wyde": 2}}, r"alpha_pattern has \['other.wyde'\].* Did you mean 'wide'\?"),
        ({"alpha_pattern": {"^wid": 2}}, r"alpha_pattern has \['\^wid'\].* Did you mean 'wide'\?"),
    ],
)
def test_a_pattern_for_nothing_is_said_in_python(fields, message):
    """PEFT lets it pass with a warning, and its suite asks for that."""
    with pytest.warns(UserWarning, match=message):
        peft.get_peft_model(build_base("Linear"), ranktune.RankConfig(target_modules=["wide", "narrow"], **fields))


def test_a_module_to_save_that_is_not_there_is_said():
    """PEFT adds the names of heads by itself, so this cannot be an error."""
    with pytest.warns(UserWarning, match=r"modules_to_save has \['haed'\].*Did you mean 'head'"):
        peft.get_peft_model(
            build_base("Linear"), ranktune.RankConfig(target_modules=["wide"], modules_to_save=["head", "haed"])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ranktune.RankConfig(target_modules=["wide"], modules_to_save=["head", "classifier", "score"])
        peft.get_peft_model(build_base("Linear"), config)


def test_what_matches_and_what_was_saved_passes(tmp_path):
    fields = {"rank_pattern": {"wi.*": 2}, "alpha_pattern": {"^narrow": 3}}
    config = ranktune.RankConfig(target_modules=["wide", "narrow"], **fields)
    model = peft.get_peft_model(build_base("Linear"), config)
    assert ranktune.ranks(model) == {"wide": 2, "narrow": 8}
    model.save_pretrained(tmp_path)
    other = build_base("Linear")
    del other.narrow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tensors that are left over
        peft.PeftModel.from_pretrained(other, str(tmp_path))


@pytest.mark.parametrize("name", ["lora", "peft-lora"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("rank_pattern: {valu: 3}", "'method.rank_pattern' names 'valu', which no module of this model is called. Did"),
        ("alpha_pattern: {valu: 3}", "'method.alpha_pattern' names 'valu', which no module"),
        ("rank_pattern: {value: 3}", "'method.rank_pattern' names 'value', and no such module is adapted. Adapted "),
        ("alpha_pattern: {value: 3}", "modules end in: query. Leave it out, or add it to 'method.target_modules'."),
        ("alpha_pattern: {'(': 3}", "'method.alpha_pattern' has the key '(', not a regular expression"),
        ("layers_to_transform: [1, 9]", "'method.layers_to_transform' names layer 9; this model's layers are numbered"),
    ],
)
def test_in_a_recipe(tmp_path, name, fields, message):
    recipe = write_everything(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = CliRunner().invoke(
            app, ["train", str(recipe), f"method={{name: {name}, target_modules: [query], {fields}}}", "--dry-run"]
        )
    assert done.exit_code == 2, done.output
    assert message in done.stderr
