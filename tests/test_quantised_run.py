"""Whole runs on quantised models: recipes, transformers' own loading, resuming, exporting, merging."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import ranktune
from ranktune.cli import app
from ranktune.dequantising import dequantised, quantisation
from ranktune.errors import ConfigError
from ranktune.exporting import export_trained
from ranktune.layer import RankLayer
from ranktune.merging import merge_trained
from ranktune.recipe import load_recipe
from ranktune.run.model import pretrained
from ranktune.run.prepare import prepare
from ranktune.run.quantization import in_words, quantization_config, unquantised
from tests.quantised import quantise
from tests.tiny import LINEAR_MODULES, write_data, write_model, write_recipe

KINDS = ["nf4", "int8", "torchao-int8"]
WIDTH = 64
METHODS = {
    "nf4": "method={name: dynamic-dora, r: 2, prune_interval: 2, lora_dropout: 0.1}",
    "int8": "method={name: dora, r: 2, lora_alpha: 4}",
    "torchao-int8": "method={name: increlora, r: 2, use_dora: true}",
}


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model wide enough for scales of 64 numbers, data, and a recipe."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    place = tmp_path_factory.mktemp("quantised")
    write_model(place / "model", WIDTH)
    write_data(place / "data")
    write_recipe(place, train={"epochs": 2, "save_every": 2, "save_total_limit": None})
    return place


@pytest.fixture(scope="module", params=KINDS)
def trained(request, folder):
    """The kind, and a run of 12 steps with checkpoints at 2, 4 ... 12, under another method for each kind."""
    out = folder / request.param
    run("train", folder / "recipe.yaml", f"quantization={request.param}", METHODS[request.param], f"output={out}")
    return request.param, out


def test_a_dry_run_tells_what_is_quantised(folder):
    text = " ".join(run("train", folder / "recipe.yaml", "quantization=nf4", "--dry-run").split())
    assert f"{LINEAR_MODULES} of {LINEAR_MODULES + 1} linear layers of the base model in nf4 (bitsandbytes)" in text
    # Per layer 4 x 64 x 64 + 2 x 64 x 128 numbers, and the pooler: 69,632 numbers of 32 bits, or of 4.13.
    assert "about 35.1 KiB instead of 272.0 KiB; as they are: classifier (trained in full)." in text
    assert not (folder / "out").exists()


def test_a_run_learns_on_a_quantised_base_and_is_scored_the_same_again(trained):
    kind, out = trained
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["after"] != metrics["before"]
    plain = AutoModelForSequenceClassification.from_pretrained(out.parent / "model")
    own = sum(parameter.numel() for parameter in plain.parameters())
    assert metrics["total_params"] == own + metrics["trainable_params"]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["quantization"] == kind
    assert json.loads(run("evaluate", out, "--json"))["scores"] == metrics["scores"]["after"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(trained, tmp_path):
    _, out = trained
    stopped = tmp_path / "out"
    shutil.copytree(out, stopped)
    for step in (8, 10, 12):
        shutil.rmtree(stopped / "checkpoints" / f"checkpoint-{step}")
    (stopped / "metrics.json").unlink()
    assert "going on from checkpoint-6" in run("train", "--resume", stopped)
    for file in ("adapter/adapter_model.safetensors", "ranks.json"):
        assert (stopped / file).read_bytes() == (out / file).read_bytes()
    assert "quantization" in refused("train", "--resume", stopped, "quantization=null")


def test_what_was_trained_exports_into_stock_peft(trained, tmp_path, request):
    kind, out = trained
    jobs = [] if kind == "nf4" else request.getfixturevalue("here")
    result = export_trained(out, tmp_path / "plain")
    assert result.agreement.effect > 0.01
    assert result.agreement.difference < 1e-4 * result.agreement.largest
    assert ("on the dequantised base model" in result.agreement.inputs) == (kind == "int8")
    assert [job["dequantize"] for job in jobs] == {"nf4": [], "int8": [True], "torchao-int8": [False]}[kind]
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.usefixtures("here")
def test_merging_needs_dequantising_and_gives_an_ordinary_model(trained, tmp_path):
    _, out = trained
    message = refused("merge", out, "--out", tmp_path / "merged")
    assert "is quantised" in message
    assert "--dequantize" in message
    assert not (tmp_path / "merged").exists()
    assert "largest difference" in run("merge", out, "--out", tmp_path / "merged", "--dequantize")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())


@pytest.mark.parametrize(
    ("kind", "package"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("torchao-int8", "torchao")]
)
def test_a_missing_library_is_named_with_what_installs_it(folder, monkeypatch, kind, package):
    monkeypatch.setattr("ranktune.run.quantization.find_spec", lambda name: None if name == package else name)
    for more in ([], ["--dry-run"]):
        message = refused("train", folder / "recipe.yaml", f"quantization={kind}", *more)
        assert f"quantization: '{kind}' needs {package}" in message
        assert "pip install 'ranktune[quantized]'" in message


def test_what_cannot_be_quantised_is_refused(folder, tmp_path):
    message = refused("train", folder / "recipe.yaml", "quantization=nf4", "method=full", "train.learning_rate=1e-4")
    assert "method 'full' trains them" in message
    write_model(tmp_path / "narrow")
    message = refused("train", folder / "recipe.yaml", "quantization=nf4", f"model={tmp_path / 'narrow'}")
    assert "nothing to quantise" in message
    assert "multiple of 64" in message
    message = refused("train", folder / "recipe.yaml", "quantization=nf8")
    assert "'nf4', 'int8' or 'torchao-int8'" in message
    assert "quantization" in refused("train", folder / "recipe.yaml", "load_in_4bit=true")


def test_4_bit_layers_are_those_whose_rows_are_whole_runs_of_scales():
    config = BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = AutoModelForSequenceClassification.from_config(config)
    assert "bert.encoder.layer.0.output.dense" in unquantised("nf4", model, ["classifier"])
    assert "bert.encoder.layer.0.intermediate.dense" not in unquantised("nf4", model, ["classifier"])
    assert "bert.encoder.layer.0.output.dense" not in unquantised("int8", model, ["classifier"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_stays_as_it_is_has_its_reason(kind):
    config = BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, vocab_size=9)
    model = AutoModelForSequenceClassification.from_config(config)
    said = in_words(kind, model, unquantised(kind, model, ["classifier", "pooler.dense"]), torch.float32)
    odd = (
        "bert.encoder.layer.0.output.dense, bert.encoder.layer.1.output.dense and 2 more (96 inputs, no multiple of 64)"
    )
    in_full = "bert.pooler.dense, classifier (trained in full)"
    expected = {"nf4": f"; as they are: {odd}; {in_full}", "int8": f"; as they are: {in_full}"}
    assert said.endswith(expected[kind])
    decoder = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    assert in_words(kind, decoder, unquantised(kind, decoder, []), torch.float32).endswith(
        "; as they are: lm_head (the output layer, or tied to it)"
    )


def test_stock_peft_trains_on_4_bits_after_it_was_scored(folder):
    """Where bitsandbytes would have rearranged the weights at the first evaluation."""
    recipe = load_recipe(folder / "recipe.yaml", ["quantization=nf4", "method=peft-lora", "method.r=2"])
    prepared = prepare(recipe, folder / "recipe.yaml")
    model = pretrained(prepared.source, prepared.task, recipe).eval()
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == LINEAR_MODULES
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2's transposed layers, with tied embeddings."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50, n_positions=16, eos_token_id=0, **dropouts)
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def loaded(path, kind, **more):
    skeleton = AutoModelForCausalLM.from_pretrained(path)
    how = quantization_config(kind, unquantised(kind, skeleton, []), torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=how, **more)


TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transposed_layers_are_quantised_and_come_back_transposed(gpt2, kind, tmp_path):
    base = loaded(gpt2, kind)
    model = peft.get_peft_model(base, ranktune.DoraConfig(target_modules=["c_attn", "c_proj", "c_fc"]))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer, RankLayer)
    assert layer.frozen().weight.shape == (3 * 64, 64)
    model.train()
    torch.testing.assert_close(model.unload().train()(TOKENS).logits, loaded(gpt2, kind).train()(TOKENS).logits)
    plain = dequantised(loaded(gpt2, kind).train())
    assert quantisation(plain) is None
    assert type(plain.transformer.h[0].attn.c_attn) is Conv1D
    expected = loaded(gpt2, kind).train()(TOKENS).logits
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.train()(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("here")
def test_a_base_that_is_stored_quantised(gpt2, tmp_path):
    """Its own folder says how: an adapter folder on it exports, and merges dequantised only."""
    stored = tmp_path / "stored"
    base = loaded(gpt2, "int8")
    base.save_pretrained(stored)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(stored),
        ranktune.RankConfig(target_modules=["c_attn"], init_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    assert export_trained(tmp_path / "adapter", tmp_path / "plain").agreement.effect > 0.01
    with pytest.raises(ConfigError, match=r"is quantised.*--dequantize"):
        merge_trained(tmp_path / "adapter", tmp_path / "merged")
    merged = merge_trained(tmp_path / "adapter", tmp_path / "merged", dequantize=True)
    assert merged.agreement.difference < 1e-4 * merged.agreement.largest
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_prepare_model_for_kbit_training(gpt2, kind, reentrant):
    """With checkpointing, in both of its modes: the gradients are those without it."""
    gradients = []
    for prepared in (False, True):
        base = loaded(gpt2, kind).train()
        if prepared:
            base = peft.prepare_model_for_kbit_training(
                base, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            assert base.is_gradient_checkpointing
        torch.manual_seed(3)
        config = ranktune.DoraConfig(target_modules=["c_attn", "c_fc"], init_weights=False)
        model = peft.get_peft_model(base, config).train()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "ranktune_" in n})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", ["dynamic-dora", "increlora", "dylora"])
def test_ranks_move_as_they_do_on_the_dequantised_weights(how, name):
    """Pruning, growth and drawing over a whole schedule, in float32; the same components survive."""
    from tests.quantised import dequantised as on_plain

    config = {
        "dynamic-dora": ranktune.DynamicDoraConfig(r=2, init_r=4, prune_interval=2, target_modules=["0", "2"]),
        "increlora": ranktune.IncreLoraConfig(r=3, grow_interval=2, grow_by=1, target_modules=["0", "2"]),
        "dylora": ranktune.DyLoraConfig(r=4, use_dora=True, target_modules=["0", "2"]),
    }[name]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    stored = quantise(net, how, skip=())
    plain = on_plain(stored, torch.float32)
    x, y = torch.randn(40, 64), torch.randn(40, 32)
    results = []
    for base in (stored, plain):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config).train()
        optimizer = torch.optim.AdamW(ranktune.parameter_groups(model, 0.01, 0.0))
        controller = ranktune.RankController(model, optimizer, total_steps=40)
        losses = []
        for _ in range(40):
            loss = (model(x) - y).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.95 * losses[0]
        results.append((ranktune.ranks(model), controller.history, model(x)))
    assert results[0][0] == results[1][0]
    changes = [[(c.step, c.module, c.old, c.new) for c in history] for _, history, _ in results]
    assert changes[0] == changes[1]
    assert bool(changes[0]) == (name != "dylora")
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-2, atol=1e-2)
