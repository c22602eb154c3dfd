"""Adapters on quantised weights, against the same adapters on the dequantised ones in float64."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from functools import partial

import peft
import pytest
import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from safetensors.torch import load_file
from torch import nn

import ranktune
from ranktune.frozen_weight import FrozenRows
from ranktune.layer import RankLayer
from ranktune.magnitude import weight_norms
from ranktune.quantised_weight import quantised_weight
from tests.methods import ROWS, TARGETS, build_base, inputs, perturb
from tests.quantised import QUANTISATIONS, dequantised, quantise

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")


@pytest.fixture(params=ROWS, ids=str)
def row(request):
    return request.param


# The scales of 4-bit weights may be quantised themselves; that shows in the rows, and nowhere else.
@pytest.fixture(params=[how for how in QUANTISATIONS if how != "nf4-double"])
def how(request):
    return request.param


def base(how: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantise(build_base("Linear", dtype), how)


def adapted(row, how, dtype=torch.float32, perturbed=True, **fields):
    model = peft.get_peft_model(base(how, dtype), row.config(**{"target_modules": TARGETS, **fields}))
    return perturb(model) if perturbed else model


def on_dequantised(row, how, model, dtype=torch.float64, **fields):
    """The same adapter on the weights that the quantised ones stand for."""
    plain = dequantised(base(how), dtype)
    plain = peft.get_peft_model(plain, row.config(**{"target_modules": TARGETS, **fields}))
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(model))
    return plain.to(dtype).train(model.training)


def adapter_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "ranktune_" in name}


def layers(model):
    return [module for module in model.modules() if isinstance(module, RankLayer)]


@pytest.mark.parametrize("how", QUANTISATIONS)
@pytest.mark.parametrize(("inputs_", "outputs"), [(128, 20), (64, 130), (12, 300), (7, 65)])
def test_rows_made_in_blocks_are_those_of_the_whole_weight(how, inputs_, outputs, monkeypatch):
    monkeypatch.setattr("ranktune.quantised_weight._BLOCK_ROWS", 16)
    torch.manual_seed(0)
    layer = quantise(nn.Sequential(nn.Linear(inputs_, outputs)), how)[0]
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=object)
    whole = backend.get_base_weight(layer)
    weight = quantised_weight(layer, backend)
    assert weight.shape == whole.shape == (outputs, inputs_)
    assert weight.dtype == whole.dtype
    blocks = list(weight.blocks())
    assert len(blocks) == -(-outputs // weight.block)
    assert (len(blocks) > 1) == (inputs_ % 64 == 0 or "nf4" not in how)
    assert torch.equal(torch.cat(blocks), whole)
    assert torch.equal(weight.dense(), whole)
    some = torch.tensor([0, 3, outputs // 2, outputs - 1])
    assert torch.equal(weight[some], whole[some])
    torch.testing.assert_close(weight_norms(weight).squared, whole.double().square().sum(1).float())


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
@pytest.mark.parametrize(("inputs_", "outputs"), [(96, 120), (7, 300), (352, 64)])
def test_rows_of_any_width_are_made_from_their_own_scales(double, inputs_, outputs, monkeypatch):
    """As on a GPU; against the format read number by number."""
    monkeypatch.setattr("ranktune.quantised_weight._BLOCK_ROWS", 16)
    monkeypatch.setattr("ranktune.quantised_weight._rows_begin_inside_runs", lambda _: False)
    torch.manual_seed(0)
    linear = nn.Linear(inputs_, outputs)
    linear.weight.data.mul_(torch.rand(outputs, inputs_))
    layer = quantise(nn.Sequential(linear), "nf4-double" if double else "nf4")[0]
    state = layer.weight.quant_state
    scales = state.absmax
    if double:
        coarse = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.long()] * coarse + state.offset
    codes = layer.weight.data.flatten()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten()[: inputs_ * outputs]
    expected = (state.code[codes.long()] * scales.repeat_interleave(64)[: len(codes)]).view(outputs, inputs_)
    weight = quantised_weight(layer, resolve_quantization_backend(layer))
    assert weight.block < outputs
    torch.testing.assert_close(torch.cat(list(weight.blocks())), expected, rtol=1e-6, atol=1e-7)
    assert (expected - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()


@pytest.mark.parametrize(("width", "wrong"), [(96, True), (128, False), (32, True)])
def test_a_base_that_the_cpu_misreads_is_warned_of(width, wrong):
    """If the kernels are mended one day, the warning has to go."""
    torch.manual_seed(0)
    linear = nn.Linear(width, 80)
    linear.weight.data.mul_(torch.rand(80, 1))
    stored = quantise(nn.Sequential(linear), "nf4")
    x = torch.randn(5, width)
    off = (stored(x) - linear(x)).norm() / linear(x).norm()
    assert (off > 0.2) == wrong
    config = ranktune.DoraConfig(target_modules=["0"])
    with pytest.warns(UserWarning, match="wrong scales.*0 is one") if wrong else nullcontext():
        model = peft.get_peft_model(stored, config)
    # What the layer computes with, not what was meant.
    torch.testing.assert_close(layers(model)[0].frozen().weight.dense() @ x.T + linear.bias.unsqueeze(1), model(x).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_fresh_adapter_changes_no_bit(row, how, dtype, mode):
    plain = getattr(base(how, dtype), mode)()
    for layer in plain.modules():
        layer.support_avx512bf16_for_cpu = False
    expected = plain(inputs(dtype))
    model = adapted(row, how, dtype, perturbed=False, lora_dropout=0.5)
    assert torch.equal(getattr(model, mode)()(inputs(dtype)), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_are_those_on_the_dequantised_weight(row, how, dropout):
    """In training. (In evaluation 8-bit layers of bitsandbytes round their inputs too, as they do without adapter.)"""
    model = adapted(row, how, lora_dropout=dropout).train()
    reference = on_dequantised(row, how, model, lora_dropout=dropout)
    found = []
    for each, dtype in ((model, torch.float32), (reference, torch.float64)):
        x = inputs().to(dtype).requires_grad_()
        torch.manual_seed(5)
        y = each(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in adapter_parameters(each).values())])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("lora", "dora", "dora-exact", "mor")], ids=str)
def test_no_dense_weight_waits_for_backward(row, how):
    """torchao's own forward keeps one, and so would the exact gradient of a norm."""
    torch.manual_seed(0)
    wide = nn.ModuleDict({"narrow": nn.Linear(128, 160), "head": nn.Linear(160, 2)})
    model = peft.get_peft_model(quantise(wide, how), row.config(target_modules=["narrow"], lora_dropout=0.1))
    layer = layers(model)[0].train()
    x = torch.randn(8, 128, requires_grad=True)
    y = layer(x)
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.is_floating_point() and o.numel() >= 128 * 160]
    assert kept == []
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert max(tensor.numel() for tensor in saved if tensor.is_floating_point()) < 128 * 160
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_and_loading_gives_the_same_outputs(row, how, dtype, tmp_path):
    model = adapted(row, how, dtype).eval()
    expected = model(inputs(dtype))
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in name]
    loaded = peft.PeftModel.from_pretrained(base(how, dtype), tmp_path, adapter_name="other").eval()
    assert torch.equal(loaded(inputs(dtype)), expected)


def test_several_adapters_switch_disable_and_unload(row, how):
    x = inputs()
    model = adapted(row, how).eval()
    plain = base(how).eval()
    for layer in plain.modules():
        layer.support_avx512bf16_for_cpu = False
    first = model(x)
    model.add_adapter("second", row.config(target_modules=["square", "narrow"], r=2))
    model.set_adapter("second")
    assert torch.equal(model(x), plain(x))
    perturb(model, seed=5)
    model.set_adapter("default")
    first = model(x)
    layer = layers(model)[0]
    probe = torch.randn(3, 12, generator=torch.Generator().manual_seed(7))
    alone = {}
    for name in ("default", "second"):
        layer.set_adapter(name)
        alone[name] = layer(probe) - layer.base_layer(probe)
    layer.set_adapter(["default", "second"])
    together = layer(probe) - layer.base_layer(probe)
    torch.testing.assert_close(together, alone["default"] + alone["second"], rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(x), first)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    unloaded = model.unload()
    assert not layers(unloaded)
    assert torch.equal(unloaded(x), plain(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_hooked_layer_computes_the_same(row, how, dropout):
    """Through stock operators and the layer's own way back."""
    model = adapted(row, how, lora_dropout=dropout).train()
    found = []
    for hooked in (False, True):
        if hooked:
            for layer in layers(model):
                layer.base_layer.register_forward_hook(lambda *_: None)
        model.zero_grad()
        x = inputs().requires_grad_()
        torch.manual_seed(3)
        y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in adapter_parameters(model).values())])
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(row, how, use_reentrant):
    found = []
    for checkpointed in (False, True):
        model = adapted(row, how, lora_dropout=0.3).train()
        x = inputs().requires_grad_()
        torch.manual_seed(11)
        run = partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=use_reentrant) if checkpointed else model
        run(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in adapter_parameters(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_merging_is_refused_and_changes_nothing(row, how):
    model = adapted(row, how).eval()
    expected = model(inputs())
    for way in (model.merge_adapter, model.merge_and_unload, layers(model)[0].merge):
        with pytest.raises(ranktune.ConfigError, match=r"would round the update away|cannot be merged"):
            way()
        assert not any(layer.merged for layer in layers(model))
        assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("row", [row for row in ROWS if row.mergeable], ids=str)
def test_the_delta_weight_is_what_it_is_on_the_dequantised_weight(row, how):
    model = adapted(row, how).eval()
    reference = on_dequantised(row, how, model)
    for ours, theirs in zip(layers(model), layers(reference), strict=True):
        torch.testing.assert_close(
            ours.get_delta_weight("default").double(), theirs.get_delta_weight("default"), rtol=1e-4, atol=1e-5
        )


def test_autocast_to_bfloat16_rounds_no_more_than_on_the_dequantised_weight(row, how):
    """In training, where 8-bit layers do not round their inputs."""
    model = perturb(adapted(row, how, perturbed=False).train(), scale=0.05)
    exact = model(inputs())
    off = []
    for each in (model, on_dequantised(row, how, model, torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(inputs())
        y.float().square().sum().backward()
        off.append((y.float() - exact).norm())
        assert all(torch.isfinite(parameter.grad).all() for parameter in adapter_parameters(each).values())
    assert off[0] < 2 * off[1]
    assert off[1] < 0.2 * exact.norm()


def test_a_deep_copy_is_independent(row, how):
    model = adapted(row, how).eval()
    expected = model(inputs())
    clone = copy.deepcopy(model)
    assert torch.equal(clone(inputs()), expected)
    perturb(clone, seed=8)
    assert torch.equal(model(inputs()), expected)
    assert not torch.equal(clone(inputs()), expected)


def test_row_norms_are_made_once_while_nothing_changes(how, monkeypatch):
    model = adapted(ROWS[2], how).eval()
    model(inputs())
    made = []
    blocks = FrozenRows.blocks
    monkeypatch.setattr(FrozenRows, "blocks", lambda weight: made.append(weight) or blocks(weight))
    model(inputs())
    assert made == []
    layers(model)[0].update_of("default").lora_B.data.add_(1.0)
    model(inputs())
    assert len(made) == 1


def test_evaluating_first_leaves_a_4_bit_model_trainable():
    """bitsandbytes would rearrange the weights for a kernel without gradient, on CPUs with AVX512-BF16."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))
    for how in ("nf4", "nf4-double"):
        stored = quantise(plain, how)
        assert hasattr(stored[0], "support_avx512bf16_for_cpu")  # the name that ranktune relies on
        whole = dequantised(stored, torch.float32)
        model = peft.get_peft_model(stored, ranktune.DoraConfig(target_modules=["0"]))
        x = torch.randn(4, 64)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), whole(x))
        x.requires_grad_()
        model.train()(x).sum().backward()
        (expected,) = torch.autograd.grad(whole(x).sum(), x)
        torch.testing.assert_close(x.grad, expected)


def test_a_4_bit_model_that_was_rearranged_already_is_refused():
    stored = base("nf4")
    stored.wide.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ranktune.ConfigError, match=r"wide: .*evaluated on this CPU already.*Load the model again"):
        peft.get_peft_model(stored, ranktune.RankConfig(target_modules=["square"]))


def test_a_library_that_cannot_dequantise_serves_plain_lora_only(monkeypatch):
    """GPTQ and its like: the layer's own product and way back; a magnitude would need the weight."""
    config = ranktune.RankConfig(target_modules=TARGETS)
    plain = perturb(peft.get_peft_model(build_base("Linear"), config))
    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr("ranktune.layer.resolve_quantization_backend", lambda *_, **__: backend)
    model = perturb(peft.get_peft_model(build_base("Linear"), config))
    x = inputs().requires_grad_()
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, plain(inputs()))
    assert x.grad is not None
    with pytest.raises(ranktune.ConfigError, match=r"gptq weight cannot be dequantised.*without use_dora"):
        peft.get_peft_model(build_base("Linear"), ranktune.DoraConfig(target_modules=TARGETS))
