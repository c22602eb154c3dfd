"""Adapter configurations: what is refused, with which words, and how saved ones find their class."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from ranktune import ConfigError, DoraConfig, RankConfig
from ranktune.config import METHODS, config_from_fields, register_method


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0 must be a whole number, at least 1"),
        ({"r": 2.5}, r"r=2.5 must be a whole number"),
        ({"r": True}, r"r=True must be a whole number"),
        ({"lora_alpha": 0}, r"lora_alpha=0 must be a finite number above 0"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan"),
        ({"lora_alpha": "8"}, r"lora_alpha='8'"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be a probability in \[0, 1\)"),
        ({"lora_alpha": float("inf")}, r"lora_alpha=inf"),
        ({"lora_alpha": True}, r"lora_alpha=True"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0.1"),
        ({"lora_dropout": "0.1"}, r"lora_dropout='0.1'"),
        ({"rank_pattern": {"wide": 0}}, r"rank_pattern\['wide'\]=0"),
        ({"rank_pattern": {"wide": 2.5}}, r"rank_pattern\['wide'\]=2.5"),
        ({"alpha_pattern": {"wide": -1}}, r"alpha_pattern\['wide'\]=-1"),
        ({"dora_dropout": "both"}, r"dora_dropout='both' must be 'both_paths' or 'low_rank_path'"),
        ({"use_rslora": "yes"}, r"use_rslora='yes' must be true or false"),
        ({"use_dora": "yes"}, r"use_dora='yes' must be true or false"),
        ({"detach_norm": 1}, r"detach_norm=1 must be true or false"),
        ({"init_weights": None}, r"init_weights=None must be true or false"),
        ({"target_modules": []}, r"target_modules is an empty list"),
        ({"layers_pattern": "layers"}, r"layers_pattern has no effect without layers_to_transform"),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, r"layers_to_transform needs target_modules"),
        ({"method": "dora"}, r"method='dora' does not belong to RankConfig.*Use DoraConfig"),
        ({"method": "lorra"}, r"Did you mean 'lora'\?"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        RankConfig(**fields)


def test_dora_without_decomposition_is_a_contradiction():
    with pytest.raises(ConfigError, match="use_dora=False contradicts DoraConfig"):
        DoraConfig(use_dora=False)


def test_an_unknown_keyword_is_pythons_own_error():
    """PEFT's forward compatibility looks for these very words."""
    with pytest.raises(TypeError, match="got an unexpected keyword argument"):
        RankConfig(rnk=4)


def test_saved_fields_find_their_class():
    assert type(config_from_fields({"method": "dora", "r": 3})) is DoraConfig
    assert type(config_from_fields({"r": 3})) is RankConfig
    with pytest.raises(ConfigError, match=r"method='dorra' is not one of .*Did you mean 'dora'"):
        config_from_fields({"method": "dorra"})


def test_fields_of_a_newer_version_are_ignored_aloud():
    with pytest.warns(UserWarning, match=r"DoraConfig has no fields \['invented'\]"):
        config = config_from_fields({"method": "dora", "r": 3, "invented": 1})
    assert config.r == 3


def test_a_taken_method_name_is_refused():
    with pytest.raises(ConfigError, match="method 'dora' is already DoraConfig"):

        @register_method
        class Impostor(RankConfig):
            method_name = "dora"

    assert METHODS["dora"] is DoraConfig


def test_copies_and_replacements_keep_the_class():
    config = DoraConfig(r=3, target_modules=["b", "a"], exclude_modules=["d", "c"])
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config, r=5).r == 5
    assert config.to_dict()["target_modules"] == ["a", "b"]
    assert config.to_dict()["exclude_modules"] == ["c", "d"]
