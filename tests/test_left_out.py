"""`all-linear` says what it does not reach: fused experts, routers, output heads."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

import ranktune
from ranktune.cli import app
from ranktune.left_out import LeftOutWarning, left_out
from ranktune.run.targets import plan
from tests.tiny import write_data, write_model, write_recipe

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MIXTRAL = MixtralConfig(intermediate_size=32, num_local_experts=4, **SIZES)
QWEN = Qwen2MoeConfig(
    intermediate_size=32, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, **SIZES
)
GPT2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
LLAMA = LlamaConfig(intermediate_size=32, tie_word_embeddings=False, **SIZES)


def build(config: PretrainedConfig, device: str = "meta") -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=["mixtral", "qwen"])
def test_experts_in_one_parameter_and_their_routers(config):
    model = build(config)
    items = {item.name: item for item in left_out(model)}
    assert list(items) == [
        "lm_head",
        "model.layers.*.mlp.gate.weight",
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    ]
    for name, item in items.items():
        if item.head:
            continue
        matching = [
            parameter for layer in range(2) for parameter in [model.get_parameter(name.replace("*", str(layer)))]
        ]
        assert (item.count, item.shape) == (2, tuple(matching[0].shape))
        assert item.parameters == sum(parameter.numel() for parameter in matching)


@pytest.mark.parametrize("config", [MIXTRAL, QWEN, GPT2, LLAMA], ids=["mixtral", "qwen", "gpt2", "llama"])
def test_every_matrix_is_adapted_named_or_an_embedding(config):
    """Nothing falls between: what all-linear adapts and what it says it leaves out are all the matrices there are."""
    model = build(config)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    said = {item.name.replace("*", str(layer)) for item in left_out(model) for layer in range(2)}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        adapted = peft.get_peft_model(model, ranktune.RankConfig(r=2, target_modules="all-linear"))
    reached = {f"{name}.weight" for name in ranktune.ranks(adapted)}
    assert matrices - embeddings - reached == {name for name in said if name in matrices} | {
        f"{name}.weight" for name in said if f"{name}.weight" in matrices - embeddings
    }


def test_heads_tied_and_not():
    (tied,) = left_out(build(GPT2))
    assert (tied.name, tied.parameters, tied.head) == ("lm_head", 0, True)
    assert "input embedding" in tied.reason
    (own,) = left_out(build(LLAMA))
    assert (own.name, own.parameters, own.shape) == ("lm_head", 800, (50, 16))
    assert "embedding" not in own.reason


def test_embeddings_convolutions_and_position_tables_are_not_meant():
    with torch.device("meta"):
        vision = ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
        )
    assert left_out(vision) == []
    assert left_out(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))) == []
    (attention,) = left_out(nn.MultiheadAttention(8, 2))
    assert attention.name == "in_proj_weight"


def test_get_peft_model_warns_once_with_everything_that_is_missed():
    model = build(MIXTRAL)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    known = ("self_attn", "norm", "embed_tokens")
    share = sum(size for name, size in sizes.items() if not any(word in name for word in known)) / sum(sizes.values())
    with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        peft.get_peft_model(model, ranktune.RankConfig(r=2, target_modules="all-linear"))
    (warning,) = [item for item in caught if item.category is LeftOutWarning]
    message = str(warning.message)
    assert "experts.gate_up_proj (2 of 4 x 64 x 16: all experts in one parameter" in message
    assert "lm_head (50 x 16: the output head)" in message
    assert f"together {share:.0%} of the model's parameters" in message


@pytest.mark.parametrize(
    ("config", "targets"), [(GPT2, "all-linear"), (GPT2, "ALL-LINEAR"), (MIXTRAL, ["q_proj"])], ids=str
)
def test_a_head_alone_and_chosen_targets_are_no_warning(config, targets, caplog):
    with torch.device("meta"), caplog.at_level(logging.INFO, "ranktune"):
        peft.get_peft_model(build(config), ranktune.RankConfig(r=2, target_modules=targets))  # warnings are errors
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (config is GPT2)
    assert all("lm_head" in message and "together" not in message for message in said)


def test_a_saved_adapter_loads_without_the_warning(tmp_path):
    config = ranktune.RankConfig(r=2, target_modules="all-linear")
    with pytest.warns(LeftOutWarning):
        adapted = peft.get_peft_model(build(MIXTRAL, "cpu"), config)
    adapted.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(build(MIXTRAL, "cpu"), tmp_path)


def test_a_plan_says_it_only_where_everything_was_asked_for():
    found = plan(ranktune.RankConfig(r=2, target_modules="all-linear"), build(LLAMA)).left_out
    assert found == (
        "target_modules 'all-linear' leaves out lm_head (50 x 16: the output head), together "
        f"{800 / sum(p.numel() for p in build(LLAMA).parameters()):.0%} of the model's parameters."
    )
    assert plan(ranktune.RankConfig(r=2, target_modules=["q_proj"]), build(LLAMA)).left_out is None


def test_the_command_line_says_it(tmp_path: Path):
    """In a dry run and in training, as lines of the run's own output and not as a warning."""
    write_model(tmp_path / "model")
    build(MIXTRAL, "cpu").save_pretrained(tmp_path / "model")  # beside the tokenizer that is there
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    recipe = write_recipe(
        tmp_path,
        data={"source": str(write_data(tmp_path / "data", 8)), "task": "causal-lm", "columns": {"text": "text"}},
        train={"max_steps": 1, "eval_every": "never"},
    )
    for extra in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["train", str(recipe), *extra])
        assert result.exit_code == 0, result.output
        shown = " ".join(result.stdout.split())
        assert shown.count("target_modules 'all-linear' leaves out lm_head") == 1
        assert "mlp.experts.gate_up_proj (2 of 4 x 64 x 16" in shown
        assert "Warning" not in result.stderr
