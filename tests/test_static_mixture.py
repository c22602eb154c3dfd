"""`mean_gate`: the plain adapter that stands for a routed one, its error, and that nothing else changes."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import ranktune
from ranktune import ConfigError, MorConfig, RankConfig, mean_gate
from ranktune.adapters import layers
from ranktune.mixture import route
from tests.methods import TARGETS, build_base, inputs, perturb

FIELDS = {
    "r": 4,
    "num_experts": 3,
    "target_modules": TARGETS,
    "alpha_pattern": {"wide": 3},
    "rank_pattern": {"narrow": 2},
}
BATCHES = [inputs(torch.float64, seed=seed) for seed in (1, 2)]


def adapted(kind="Linear", **fields):
    model = peft.get_peft_model(build_base(kind, torch.float64), MorConfig(**{**FIELDS, **fields}))
    return perturb(model).eval()


def mean_gates_by_hand(model):
    """Module name to the mean of the gates, from the inputs its layer really gets."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in layers(model, "default")
    ]
    for batch in BATCHES:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {
        name: route(torch.cat(seen[name]), layer.update_of("default").router).flatten(0, -2).mean(0)
        for name, layer in layers(model, "default")
    }


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_static_adapter_is_the_mixture_at_the_mean_gates(kind):
    model = adapted(kind)
    expected = mean_gates_by_hand(model)
    report = mean_gate(model, BATCHES)
    assert report.adapter_name == "mean_gate"
    for name, layer in layers(model, "default"):
        torch.testing.assert_close(torch.tensor(report.gates[name]).double(), expected[name], rtol=1e-5, atol=1e-6)
        update = layer.update_of("default")
        dense = layer.scaling["default"] * sum(
            g * b.diag() @ update.lora_B @ a.diag() @ update.lora_A
            for g, a, b in zip(expected[name], update.expert_A, update.expert_B, strict=True)
        )
        delta = layer.get_delta_weight("mean_gate")
        torch.testing.assert_close(delta.T if kind == "Conv1D" else delta, dense, rtol=1e-5, atol=1e-5)


def test_the_reported_errors_are_the_real_ones():
    model = adapted()
    y = torch.cat([model(batch) for batch in BATCHES])
    with model.disable_adapter():
        base = torch.cat([model(batch) for batch in BATCHES])
    report = mean_gate(model, BATCHES)
    model.set_adapter("mean_gate")
    static = torch.cat([model(batch) for batch in BATCHES])
    assert report.output_error == pytest.approx(float(((static - y).norm() / (y - base).norm()).detach()), rel=1e-4)
    assert report.routed_loss is None
    assert report.static_loss is None
    # The first module gets the same input in both models.
    _, first = next(layers(model, "default"))
    exact, approximate = [], []
    for name, found in (("default", exact), ("mean_gate", approximate)):
        first.set_adapter(name)
        found.extend(first(batch) - first.base_layer(batch) for batch in BATCHES)
    exact, approximate = torch.cat(exact), torch.cat(approximate)
    expected = float(((approximate - exact).norm() / exact.norm()).detach())
    assert report.module_errors["square"] == pytest.approx(expected, rel=1e-4)
    assert 0.01 < expected < 1


def test_it_merges_and_exports_like_plain_lora(tmp_path):
    model = adapted()
    mean_gate(model, BATCHES, static_name="plain")
    with pytest.raises(ConfigError, match="mean_gate"):
        ranktune.export_lora(model, tmp_path / "routed")
    assert not (tmp_path / "routed").exists()
    ranktune.export_lora(model, tmp_path / "plain", adapter_name="plain")
    model.set_adapter("plain")
    expected = model(BATCHES[0])
    stock = peft.PeftModel.from_pretrained(build_base("Linear", torch.float64), tmp_path / "plain").eval()
    torch.testing.assert_close(stock(BATCHES[0]), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(BATCHES[0]), expected, rtol=1e-9, atol=1e-9)


def test_a_router_that_always_says_the_same_is_met_exactly():
    model = adapted()
    with torch.no_grad():
        for _, layer in layers(model, "default"):
            layer.update_of("default").router.zero_()
    report = mean_gate(model, BATCHES)
    assert report.output_error < 1e-6
    assert max(report.module_errors.values()) < 1e-6
    uniform = mean_gate(adapted(router="uniform"), BATCHES)
    assert uniform.output_error < 1e-6
    assert uniform.gates["wide"] == pytest.approx([1 / 3] * 3)


def test_everything_else_stays_as_it_was():
    model = adapted(lora_dropout=0.3).train()
    model.add_adapter("other", RankConfig(target_modules=["wide"]))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    mean_gate(model, iter(BATCHES))
    assert not torch.equal(random, torch.get_rng_state())  # the new adapter draws its own start
    assert model.training
    assert model.active_adapters == ["default"]
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == required.get(name, False), name
    assert all(layer.update_of("default").usage is None for _, layer in layers(model, "default"))
    assert not any(layer._forward_pre_hooks for _, layer in layers(model, "default"))


def test_a_classifier_keeps_its_trained_head(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes, hidden_dropout_prob=0.0))
    model = peft.get_peft_model(
        base, MorConfig(r=2, num_experts=2, target_modules=["query", "dense"], task_type="SEQ_CLS")
    )
    perturb(model, scale=0.1)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    ids = torch.arange(12).view(2, 6)
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1])}]
    report = mean_gate(model, batches)
    model.eval()
    routed = model(**batches[0])
    model.set_adapter("mean_gate")
    static = model(**batches[0])
    assert report.routed_loss == pytest.approx(routed.loss.item(), rel=1e-6)
    assert report.static_loss == pytest.approx(static.loss.item(), rel=1e-6)
    assert (routed.logits - static.logits).abs().max() < 0.2 * routed.logits.abs().max()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mean_gate" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "no token of the batches reached"),
        ({"batches": BATCHES, "static_name": "default"}, "already has an adapter 'default'"),
        ({"batches": BATCHES, "adapter_name": "plain"}, "'plain' is of method 'lora': only mor"),
        ({"batches": BATCHES, "adapter_name": "typo"}, "no ranktune adapter 'typo'"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(arguments, message):
    model = adapted()
    model.add_adapter("plain", RankConfig(target_modules=["wide"]))
    with pytest.raises(ConfigError, match=message):
        mean_gate(model, **arguments)
    assert set(model.peft_config) == {"default", "plain"}
    assert model.active_adapters == ["default"]


def test_a_failing_model_is_left_as_it_was():
    model = adapted()

    def fail(*_):
        raise RuntimeError("out of luck")

    handle = nn.Module.register_forward_hook(model.base_model.model.head, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        mean_gate(model, BATCHES)
    handle.remove()
    assert all(layer.update_of("default").usage is None for _, layer in layers(model, "default"))
