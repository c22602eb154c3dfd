"""Row norms are computed when something they depend on has changed, and only then."""

from __future__ import annotations

import peft
import pytest
import torch

import ranktune.norm_cache
from ranktune import DoraConfig
from ranktune.adapters import updates
from ranktune.norm_cache import NormCache
from tests.methods import TARGETS, build_base, inputs, perturb


@pytest.fixture
def computed(monkeypatch):
    """Counts how often row norms are computed."""
    calls = []
    original = ranktune.norm_cache.row_norms

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(ranktune.norm_cache, "row_norms", counting)
    return calls


@pytest.fixture
def model():
    return perturb(peft.get_peft_model(build_base("Linear"), DoraConfig(r=4, target_modules=TARGETS)))


def fresh_copy_output(model):
    """What the same weights give with no cache at all: a reference the cache must always equal."""
    reference = peft.get_peft_model(build_base("Linear"), DoraConfig(r=4, target_modules=TARGETS))
    reference.load_state_dict(model.state_dict())
    return reference.eval()(inputs())


def test_evaluation_and_accumulation_reuse_the_norms(model, computed):
    for _ in range(4):
        model.eval()(inputs())
    assert len(computed) == len(TARGETS)
    for _ in range(3):
        model.train()(inputs()).sum().backward()
    assert len(computed) == len(TARGETS)


def test_checkpoint_recomputation_reuses_the_norms(model, computed):
    x = inputs().requires_grad_()
    torch.utils.checkpoint.checkpoint(model.train(), x, use_reentrant=False).sum().backward()
    assert len(computed) == len(TARGETS)


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused"])
def test_an_optimizer_step_is_noticed(model, computed, kind):
    """Fused AdamW does not raise the parameters' version counters."""
    options = {} if kind == "plain" else {kind: True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **options)
    for _ in range(3):
        model.train()(inputs()).square().sum().backward()
        computed.clear()
        optimizer.step()
        output = model.eval()(inputs())
        assert len(computed) == len(TARGETS)
        torch.testing.assert_close(output, fresh_copy_output(model), rtol=1e-6, atol=1e-6)


def write_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1.7)


def write_in_place(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.add_(0.3)


def replace_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data * 0.4


def load_state(model):
    changed = {name: value * 1.3 for name, value in model.state_dict().items() if "lora_A" in name}
    model.load_state_dict(changed, strict=False)


def edit_base(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer.weight" in name:
                parameter.mul_(1.5)


def replace_base(model):
    for name, parameter in model.named_parameters():
        if "base_layer.weight" in name:
            parameter.data = parameter.data * 1.5


@pytest.mark.parametrize(
    "change", [write_data, write_in_place, replace_data, load_state, edit_base, replace_base], ids=lambda f: f.__name__
)
def test_every_kind_of_write_is_noticed(model, change):
    before = model.eval()(inputs())
    change(model)
    after = model(inputs())
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, fresh_copy_output(model), rtol=1e-6, atol=1e-6)


def test_a_double_round_trip_through_half_precision_is_noticed(model):
    model.eval()(inputs())
    model.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(model(inputs()), fresh_copy_output(model), rtol=1e-6, atol=1e-6)


def test_another_scale_is_noticed(model):
    model.eval()(inputs())
    for module in model.modules():
        if isinstance(module, ranktune.tuner.RankLayer):
            module.scaling["default"] *= 3
    tripled = model(inputs())
    for _, update in updates(model):
        update._cache = NormCache()
    assert torch.equal(model(inputs()), tripled)


def test_nothing_cached_under_inference_mode_reaches_training(model):
    with torch.inference_mode():
        model.eval()(inputs())
    model.train()(inputs()).sum().backward()


def test_the_cached_norm_has_no_history(model):
    model.train()(inputs())
    for _, update in updates(model):
        assert not update._cache._cached.norms.requires_grad
