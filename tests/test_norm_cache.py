"""Row norms are computed when something they depend on has changed, and only then."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from torch import nn

import ranktune.norm_cache
from ranktune import DoraConfig
from ranktune.adapters import updates
from ranktune.lowrank import Components, Span
from ranktune.magnitude import weight_norms
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
        if isinstance(module, ranktune.layer.RankLayer):
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


def test_the_clock_alone_notices_a_fused_step(model, monkeypatch):
    """On an accelerator nothing is compared by value, and fused AdamW leaves storage and version as they were."""
    cached = ranktune.norm_cache._Cached
    monkeypatch.setattr(cached, "holds_for", lambda self, marks, sources: self.marks == marks)  # noqa: ARG005
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    model.train()(inputs()).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.eval()(inputs()), fresh_copy_output(model), rtol=1e-6, atol=1e-6)


def test_a_fused_step_on_the_weight_itself_is_noticed():
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    cache = NormCache()
    cache.constants(weight)
    weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(cache.constants(weight).squared, weight.detach().square().sum(1))


def test_a_weight_moved_within_its_storage_is_noticed():
    """Sharded and offloaded models keep parameters as views of one buffer."""
    pool = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(pool[0], requires_grad=False)
    cache = NormCache()
    cache.constants(weight)
    weight.data = pool[1]
    torch.testing.assert_close(cache.constants(weight).squared, pool[1].square().sum(1))


def test_norms_are_of_the_components_that_take_part_at_their_scale():
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(*shape, generator=generator) for shape in ((4, 3), (5, 3), (4, 5)))
    gate = torch.tensor([1.0, -0.5, 2.0, 0.0, 3.0])
    cache = NormCache()
    for scale, end in ((1.0, 5), (1.0, 3), (2.0, 3), (2.0, 0), (1.0, 5)):
        norms = cache.norms(weight, Components(A, B, scale, gate, Span(0, end)), [A, B, gate])
        expected = (weight + scale * (B * gate)[:, :end] @ A[:end]).norm(dim=1)
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-5)


def test_the_constants_of_a_frozen_weight_are_computed_once(model, monkeypatch):
    calls = []
    monkeypatch.setattr(ranktune.norm_cache, "weight_norms", lambda weight: calls.append(1) or weight_norms(weight))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model.train()(inputs()).square().sum().backward()
        optimizer.step()
    assert len(calls) <= len(TARGETS)


def test_the_constants_of_a_trained_weight_have_no_history():
    """Two backwards through one cached value: a graph kept in the cache would be gone at the second."""
    model = peft.get_peft_model(build_base("Linear"), DoraConfig(r=4, target_modules=["wide"], detach_norm=False))
    perturb(model).base_model.model.wide.base_layer.weight.requires_grad_(True)
    for _ in range(2):
        model(inputs()).sum().backward()


def test_a_model_made_under_inference_mode_runs_outside_it(model):
    """Its tensors have no versions to go by."""
    with torch.inference_mode():
        made_there = perturb(peft.get_peft_model(build_base("Linear"), DoraConfig(r=4, target_modules=TARGETS)))
    with torch.no_grad():
        torch.testing.assert_close(made_there.eval()(inputs()), model.eval()(inputs()))


def test_a_pickled_update_takes_no_cached_norms_along(model):
    expected = model.eval()(inputs())
    layer = model.base_model.model.wide
    layer.ranktune_update["default"] = pickle.loads(pickle.dumps(layer.update_of("default")))
    assert layer.update_of("default")._cache._cached is None
    assert torch.equal(model(inputs()), expected)
