"""`ranktune export` and `ranktune merge`: the folder loads in a process without ranktune, or there is no folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, GenerationConfig, GPT2Config, GPT2LMHeadModel

import ranktune
from ranktune import exporting, merging
from ranktune.errors import AdapterFileError, ConfigError, ExportError, RecipeError
from ranktune.exporting import export_trained
from ranktune.merging import merge_trained
from ranktune.report.exports import merge_lines
from ranktune.tuner import RankTuner
from ranktune.verification import in_stock_peft, opening, proof
from tests.command_line import command
from tests.methods import perturb
from tests.support import PAGE as SUPPORT
from tests.tiny import write_everything, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of dynamic-dora, pruned to uneven ranks."""
    folder = tmp_path_factory.mktemp("trained")
    write_everything(folder)
    method = {"name": "dynamic-dora", "r": 3, "use_dora": True}
    recipe = write_recipe(folder, method=method, train={"max_steps": 40, "epochs": 1})
    done = command("train", recipe, "--quiet")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 folder (Conv1D, tied weights, generation settings, bfloat16) and an adapter for it."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2LMHeadModel(config).to(torch.bfloat16)
    base.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3, eos_token_id=1)
    base.save_pretrained(folder / "base")
    base = GPT2LMHeadModel.from_pretrained(folder / "base", dtype=torch.float32)
    config = ranktune.RankConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    perturb(peft.get_peft_model(base, config)).save_pretrained(folder / "adapter")
    return folder


def test_a_run_exports_into_stock_peft(trained, tmp_path):
    """Proved by a process without ranktune, in the command itself."""
    done = command("export", trained / "out", "--out", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    assert "16 examples of the evaluation split in a process without ranktune: largest difference" in done.output
    assert "DoRA of 13 modules" in done.output
    assert "vLLM, TGI and llama.cpp do not" in done.output
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"], config["task_type"]) == ("LORA", True, "SEQ_CLS")
    assert set(config["modules_to_save"]) == {"classifier", "score"}
    final = json.loads((trained / "out" / "ranks.json").read_text())["final"]
    assert config["r"] == max(final.values()) > min(final.values())
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_process_that_imported_ranktune_proves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(in_stock_peft, "do", lambda _: None)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(SystemExit, match="ranktune was imported"):
        in_stock_peft.main(str(tmp_path / "job.json"))
    code = (
        f"import sys; sys.argv = ['x', {str(tmp_path / 'none.json')!r}]; exec(open({in_stock_peft.__file__!r}).read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "FileNotFoundError" in done.stderr  # it reached its job without importing ranktune


def test_what_does_not_load_elsewhere_is_an_error(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ExportError, match=r"does not load in a process without ranktune: KeyError: 'seed'"):
        proof.run_elsewhere(tmp_path / "job.json")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("profile", ["uniform", "compact"])
def test_the_default_place_and_both_profiles(trained, profile):
    done = command("export", trained / "out", "--profile", profile)
    assert done.exit_code == 0, done.output
    folder = trained / f"out-{profile}"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == (profile == "compact")
    again = command("export", trained / "out", "--profile", profile)
    assert again.exit_code == 2
    assert "exists already" in again.output


@pytest.mark.usefixtures("here")
def test_two_ranks_of_one_adapter_have_folders_of_their_own(tmp_path):
    write_everything(tmp_path)
    method = {"name": "dylora", "r": 4, "use_dora": True}
    assert command("train", write_recipe(tmp_path, method=method), "--quiet").exit_code == 0
    for more in (["--rank", 2], ["--rank", 3], ["--rank", 3, "--profile", "compact"], ["--svd-rank", 2]):
        done = command("export", tmp_path / "out", *more)
        assert done.exit_code == 0, done.output
    made = {path.name: json.loads((path / "adapter_config.json").read_text())["r"] for path in tmp_path.glob("out-*")}
    assert made == {"out-uniform-rank2": 2, "out-uniform-rank3": 3, "out-compact-rank3": 3, "out-uniform-svd2": 2}


def test_the_command_refuses_to_cut_in_the_words_of_the_documentation(trained, tmp_path):
    done = command("export", trained / "out", "--rank", 2, "--out", tmp_path / "cut")
    assert done.exit_code == 2
    row = next(line for line in SUPPORT.read_text().splitlines() if line.startswith("| cutting what is not nested"))
    documented = row.split("|")[2].strip().replace("'lora'", "'dynamic-dora'")
    assert done.stderr.strip() == f"error: {documented}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["LORA", "ADALORA"])
def test_stock_adapters_are_sent_to_the_commands_that_take_them(gpt2, tmp_path, kind):
    """And those do."""
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    if kind == "ADALORA":
        config = peft.AdaLoraConfig(init_r=2, total_step=9, target_modules=["c_attn"], fan_in_fan_out=True)
    base = GPT2LMHeadModel.from_pretrained(gpt2 / "base", dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "stock")
    done = command("export", tmp_path / "stock", "--out", tmp_path / "plain")
    assert done.exit_code == 2
    assert f"is stock PEFT's own adapter ({kind})" in done.stderr
    advised = re.findall(r"`ranktune (.*?)`", done.stderr)
    assert [words.split()[0] for words in advised] == ["squeeze", "merge"]
    for words in advised:
        done = command(*words.replace("DIR", str(tmp_path / "merged")).split())
        assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"stock", "stock-energy100", "merged"}


@pytest.mark.usefixtures("here")
def test_a_folder_that_computes_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    """A wrong scale in a single module, written after the module's own check."""

    def wrong(model, folder, *args, **options):
        exported = ranktune.export_lora(model, folder, *args, **options)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if "layer.1.attention.self.value.lora_B" in name)
        save_file({**tensors, name: tensors[name] * 1.05}, folder / "adapter_model.safetensors", {"format": "pt"})
        return exported

    monkeypatch.setattr(exporting, "export_lora", wrong)
    with pytest.raises(ExportError, match="in stock PEFT outputs differ by up to"):
        export_trained(trained / "out", tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_an_approximation_is_reported_and_kept(trained, tmp_path):
    done = command("export", trained / "out", "--svd-rank", 2, "--out", tmp_path / "svd")
    assert done.exit_code == 0, done.output
    assert "truncated SVD loses" in done.output
    assert "LoRA of 13 modules, rank 2" in done.output
    assert not json.loads((tmp_path / "svd" / "adapter_config.json").read_text())["use_dora"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("source", ["folder of a run", "folder of PEFT"])
def test_an_adapter_folder(trained, gpt2, tmp_path, source):
    path = trained / "out" / "adapter" if source == "folder of a run" else gpt2 / "adapter"
    result = export_trained(path, tmp_path / "plain", "compact")
    assert result.agreement.difference < 1e-4
    assert result.agreement.effect > 1e-2
    words = "docstrings" if source == "folder of a run" else "random tokens"
    assert words in result.agreement.inputs


@pytest.mark.usefixtures("here")
def test_merge_gives_a_plain_folder(trained, tmp_path):
    done = command("merge", trained / "out", "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "largest difference" in done.output
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    opened = opening.open_trained(trained / "out")
    torch.testing.assert_close(
        proof.outputs_of(merged, opened.batch), proof.outputs_of(opened.model, opened.batch), rtol=1e-5, atol=1e-5
    )
    assert merged.config.label2id == {"animal": 0, "colour": 1}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("red cat")["input_ids"] == opened.tokenizer("red cat")["input_ids"]


@pytest.mark.usefixtures("here")
def test_merge_casts_once_and_keeps_tied_weights_shards_and_generation_settings(gpt2, tmp_path):
    result = merge_trained(gpt2 / "adapter", tmp_path / "merged", max_shard_size="8KB")
    assert result.dtype == torch.bfloat16  # the base model's own
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert (merged.generation_config.top_k, merged.generation_config.max_new_tokens) == (3, 7)
    # float32 sum, rounded once: exactly this, and not bfloat16 arithmetic.
    saved = load_file(gpt2 / "adapter" / "adapter_model.safetensors")
    A, B = (
        saved[f"base_model.model.transformer.h.0.attn.c_attn.ranktune_update.lora_{factor}"].float() for factor in "AB"
    )
    base = GPT2LMHeadModel.from_pretrained(gpt2 / "base", dtype=torch.float32)
    exact = base.transformer.h[0].attn.c_attn.weight + (8 / 2) * (B @ A).T
    assert torch.equal(merged.transformer.h[0].attn.c_attn.weight, exact.to(torch.bfloat16))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 2**-24)])
def test_what_rounding_does_is_told_apart_from_merging(gpt2, tmp_path, dtype, step):
    """Against the rounding of every weight by hand; the folder has to give what was rounded, to float32's precision."""
    result = merge_trained(gpt2 / "adapter", tmp_path / "merged", dtype)
    opened = opening.open_trained(gpt2 / "adapter")
    expected = proof.outputs_of(opened.model, opened.batch)
    with opened.model.disable_adapter():
        effect = float((expected - proof.outputs_of(opened.model, opened.batch)).abs().max())
    model = opened.model.merge_and_unload()
    assert result.merging == pytest.approx(float((proof.outputs_of(model, opened.batch) - expected).abs().max()))
    assert result.merging < 1e-5
    model.to(getattr(torch, dtype)).float()
    rounding = float((proof.outputs_of(model, opened.batch) - expected).abs().max())
    assert result.rounding == pytest.approx(rounding, rel=1e-4)
    assert result.agreement.difference < 1e-6 < 1e-4 * result.agreement.largest
    words = " ".join(merge_lines(result, gpt2 / "adapter"))
    assert f"merged in float32: largest difference {result.merging:.2g} from the adapter on its base" in words
    if dtype == "float32":
        assert "rounded to" not in words
    else:
        assert 0.1 * step < rounding < 100 * step * result.agreement.largest
        assert f"; rounded to {dtype}: {rounding:.2g}, {rounding / effect:.2%} of what the adapter does" in words


@pytest.mark.usefixtures("here")
def test_a_sum_that_is_not_the_adapter_on_its_base_is_not_kept(gpt2, tmp_path, monkeypatch):
    """Rounding to bfloat16 does not hide it."""

    def wrong(tuner, **options):
        merged = real(tuner, **options)
        merged.transformer.h[0].attn.c_attn.weight.data.mul_(1.003)
        return merged

    real = RankTuner.merge_and_unload
    monkeypatch.setattr(RankTuner, "merge_and_unload", wrong)
    with pytest.raises(ExportError, match="with the adapter merged, outputs differ by up to"):
        merge_trained(gpt2 / "adapter", tmp_path / "merged", "bfloat16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_a_merge_that_computes_something_else_is_not_kept(gpt2, tmp_path, monkeypatch):
    real = merging.model_agreement

    def wrong(opened, expected, *rest):
        return real(opened, expected + 1.0, *rest)

    monkeypatch.setattr(merging, "model_agreement", wrong)
    with pytest.raises(ExportError, match="the merged model's outputs differ"):
        merge_trained(gpt2 / "adapter", tmp_path / "merged", "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_values_that_a_dtype_cannot_hold(gpt2, tmp_path, monkeypatch):
    def huge(path, **_):
        opened = opening.open_trained(path)
        opened.model.get_base_model().transformer.ln_f.bias.data[0] = 1e6
        return opened

    monkeypatch.setattr(merging, "open_trained", huge)
    with pytest.raises(ConfigError, match=r"ln_f.bias has values that float16 cannot hold"):
        merge_trained(gpt2 / "adapter", tmp_path / "merged", "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_model_name_or_path": None}, AdapterFileError, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, AdapterFileError, "its base model cannot be found"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "logging"}}, AdapterFileError, "name no model class"),
        ({"task_type": "IMAGE_CLASSIFICATION"}, AdapterFileError, "name no model class"),
    ],
)
def test_adapters_whose_base_is_not_there(gpt2, tmp_path, change, error, message):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    fields = json.loads((gpt2 / "adapter" / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, **change}))
    (adapter / "adapter_model.safetensors").write_bytes((gpt2 / "adapter" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(error, match=message):
        export_trained(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_trained_in_full_is_a_folder_already(trained, tmp_path):
    out = tmp_path / "out"
    (out / "adapter").mkdir(parents=True)
    for name in ("metrics.json", "recipe.yaml"):
        (out / name).write_bytes((trained / "out" / name).read_bytes())
    with pytest.raises(ConfigError, match="trained in full"):
        merge_trained(out, tmp_path / "merged")


def test_what_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="there is no directory"):
        export_trained(tmp_path / "none", tmp_path / "out")
    done = command("merge", tmp_path, "--out", tmp_path / "out", "--dtype", "bflot16")
    assert done.exit_code == 2
    assert "Did you mean 'bfloat16'" in done.output


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["stock", "ours"])
@pytest.mark.parametrize("change", ["lost", "left over"])
def test_a_file_that_is_not_all_of_the_adapter_is_not_used(gpt2, tmp_path, kind, change):
    """PEFT puts random numbers where a tensor is missing, and leaves out what it has no place for."""
    if kind == "ours":
        shutil.copytree(gpt2 / "adapter", tmp_path / "adapter")
    else:
        base = GPT2LMHeadModel.from_pretrained(gpt2 / "base", dtype=torch.float32)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "h.1.attn.c_attn" in name and "lora_A" in name)
    taken = tensors[name]
    if change == "lost":
        del tensors[name]
    else:
        tensors[name.replace("h.1", "h.7")] = taken.clone()
    save_file(tensors, file, {"format": "pt"})
    words = {"lost": r"lacks .*h\.1\.attn|h\.1\.attn.* lacks", "left over": r"h\.7.* no place"}
    with pytest.raises(AdapterFileError, match=words[change]):
        merge_trained(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_wrong_folders_are_told_what_they_are(trained, tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path / "model")
    shutil.copytree(trained / "out" / "adapter", tmp_path / "runs" / "one" / "adapter")
    for name, words in {
        tmp_path / "model": "and this one a whole model",
        tmp_path / "runs": f"in it are runs, such as {tmp_path / 'runs' / 'one'}",
        tmp_path: "an adapter folder holds adapter_config.json and adapter_model.safetensors",
    }.items():
        for arguments in (
            ["inspect"],
            ["squeeze", "--budget", "rank=3"],
            ["export"],
            ["merge", "--out", tmp_path / "x"],
        ):
            done = command(arguments[0], name, *arguments[1:])
            assert done.exit_code == 2
            assert words in done.stderr, done.stderr
    done = command("evaluate", trained / "out" / "adapter")
    assert f"ranktune evaluate RUN --adapter {trained / 'out' / 'adapter'}" in done.stderr
