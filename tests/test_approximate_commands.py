"""`--approximate mean_gate`: a mor adapter exported and merged as what its router decides in the mean."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from ranktune import ConfigError, mean_gate, merging
from ranktune.errors import ExportError
from ranktune.exporting import export_trained
from ranktune.merging import merge_trained
from ranktune.verification import proof
from ranktune.verification.opening import open_trained
from tests.command_line import command
from tests.tiny import LINEAR_MODULES, write_everything, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of mor, whose routers tell tokens apart."""
    folder = tmp_path_factory.mktemp("mor")
    write_everything(folder)
    method = {"name": "mor", "r": 2, "num_experts": 3, "router_std": 1.0, "expert_noise": 0.5}
    done = command("train", write_recipe(folder, method=method, train={"epochs": 4}), "--quiet")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def expected(trained):
    """The report of the function itself, the inputs, and the approximation's outputs."""
    opened = open_trained(trained / "out")
    report = mean_gate(opened.model, [opened.batch])
    opened.model.set_adapter("mean_gate")
    return report, opened.batch, proof.outputs_of(opened.model, opened.batch)


def base_of(trained):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(trained / "model")


def test_exporting_an_approximation_is_proved_and_its_error_told(trained, tmp_path, expected):
    report, batch, outputs = expected
    done = command("export", trained / "out", "--approximate", "mean_gate", "--out", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    assert f"LoRA of {LINEAR_MODULES} modules, rank 2" in done.output
    assert report.output_error > 0.005
    assert f"differs by {report.output_error:.2%} of what the mor adapter changes" in done.output
    worst = max(report.module_errors, key=report.module_errors.__getitem__)
    assert f"{report.module_errors[worst]:.2%} in {worst}" in done.output
    assert f"loss on them {report.static_loss:.4f}, with the mor adapter {report.routed_loss:.4f}" in done.output
    assert "in a process without ranktune: largest difference" in done.output
    plain = peft.PeftModel.from_pretrained(base_of(trained), tmp_path / "plain")
    torch.testing.assert_close(proof.outputs_of(plain, batch), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("here")
def test_merging_an_approximation(trained, tmp_path, expected):
    report, batch, outputs = expected
    done = command("merge", trained / "out", "--approximate", "mean_gate", "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert re.search(rf"the output differs by {report.output_error:.2%} of what", done.output)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(proof.outputs_of(merged, batch), outputs, rtol=1e-4, atol=1e-5)
    assert not any("ranktune" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))


@pytest.mark.usefixtures("here")
def test_the_proof_judges_the_approximation(trained, tmp_path, monkeypatch):
    real = merging.model_agreement
    monkeypatch.setattr(merging, "model_agreement", lambda opened, y, *rest: real(opened, y + 1.0, *rest))
    with pytest.raises(ExportError, match="the merged model's outputs differ"):
        merge_trained(trained / "out", tmp_path / "merged", approximate="mean_gate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["export", "merge"])
def test_exactly_is_refused_by_name_with_the_way_out(trained, tmp_path, name):
    done = command(name, trained / "out", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "a mor adapter with a router cannot be merged" in done.stderr
    assert "--approximate mean_gate" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export_trained, merge_trained])
def test_words_that_name_no_approximation(trained, tmp_path, write):
    with pytest.raises(ConfigError, match=r"approximate='mean_gat' must be .*Did you mean 'mean_gate'"):
        write(trained / "out", tmp_path / "out", approximate="mean_gat")


def test_what_needs_no_approximation_is_refused(tmp_path):
    write_everything(tmp_path)
    assert command("train", tmp_path / "recipe.yaml", "train.max_steps=1", "--quiet").exit_code == 0
    done = command("export", tmp_path / "out", "--approximate", "mean_gate", "--out", tmp_path / "plain")
    assert done.exit_code == 2
    assert "'lora': only mor has gates to average" in done.stderr
    assert not (tmp_path / "plain").exists()
