"""A nested update at every rank, on every path, against the definition with detached factors and stock PEFT."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ranktune
from ranktune import DyLoraConfig
from ranktune.adapters import updates
from ranktune.lowrank import Span, low_rank_linear
from ranktune.nested import Draw
from tests.methods import TARGETS, build_base, inputs, perturb

R, ALPHA = 4, 6
SPANS = [Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4), Span(1, 4), Span(0, 2), Span(0, 4)]
KINDS = ["Linear", "Conv1D"]


def build(kind="Linear", dtype=torch.float64, perturbed=True, **fields):
    config = DyLoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS, **fields})
    model = peft.get_peft_model(build_base(kind, dtype), config)
    return perturb(model) if perturbed else model


def draw(model, span):
    """What a controller does for a step that is to train this span."""
    drawn = Draw(lambda _: span, torch.device("cpu"))
    for _, update in updates(model):
        update.follow(drawn)
        update.needs_controller = False
    return drawn


def layers(model):
    return [module for module in model.modules() if isinstance(module, ranktune.layer.RankLayer)]


def run(model, x, upstream=None):
    """Output, and the gradients of the input and of every adapter tensor."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * (torch.ones_like(y) if upstream is None else upstream)).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "ranktune_" in name}
    return y.detach(), x.grad, grads


def definition(layer, x, span, power=1.0, dropped=None):
    """``h = W x + bias + (alpha / b^p) B[:, :b] A[:b] d(x)``, weight-decomposed where there is a magnitude; what is
    not trained is detached, and the norm is a constant."""
    update, (first, end) = layer.update_of("default"), span
    A = torch.cat([update.lora_A[:first].detach(), update.lora_A[first:end]])
    B = torch.cat([update.lora_B[:, :first].detach(), update.lora_B[:, first:end]], 1)
    weight, bias, s = layer.frozen().weight, layer.frozen().bias, ALPHA / end**power
    low_rank = s * F.linear(F.linear(x if dropped is None else dropped, A), B)
    if update.lora_magnitude_vector is None:
        return F.linear(x, weight, bias) + low_rank
    norm = (weight + s * B @ A).norm(dim=1)
    gain = update.lora_magnitude_vector / (norm.detach() if update.detach_norm else norm)
    y = gain * (F.linear(x, weight) + low_rank)
    return y if bias is None else y + bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
def test_a_fresh_adapter_is_the_base_at_every_rank(kind, decomposed):
    expected = build_base(kind, torch.float64)(inputs(torch.float64))
    model = build(kind, perturbed=False, use_dora=decomposed)
    for b in range(1, R + 1):
        draw(model, Span(b - 1, b))
        assert torch.equal(model.train()(inputs(torch.float64)), expected)
        ranktune.set_rank(model, b)
        assert torch.equal(model.eval()(inputs(torch.float64)), expected)


@pytest.mark.parametrize(
    ("path", "kind"), [("fused", "Linear"), ("fused", "Conv1D"), ("plain", "Linear"), ("compiled", "Conv1D")]
)
@pytest.mark.parametrize(
    ("fields", "power"),
    [
        ({}, 1.0),
        ({"use_rslora": True}, 0.5),
        ({"use_dora": True}, 1.0),
        ({"use_dora": True, "detach_norm": False}, 1.0),
    ],
    ids=["lora", "rslora", "dora", "dora-exact"],
)
def test_output_and_gradients_equal_the_definition(path, kind, fields, power):
    torch._dynamo.reset()
    model = build(kind, **fields).train()
    layer = layers(model)[0]
    call = layer
    if path == "plain":
        layer.base_layer.register_forward_hook(lambda *_: None)
    elif path == "compiled":
        call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs(torch.float64)
    upstream = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for span in SPANS:
        draw(model, span)
        update = layer.update_of("default")
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = definition(layer, theirs, span, power)
        tensors = list(update.parameters())
        wanted = torch.autograd.grad(expected, [theirs, *tensors], upstream)
        y = call(ours)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(y, [ours, *tensors], upstream)
        for name, gradient, right in zip(["x", *dict(update.named_parameters())], found, wanted, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora-two-paths"])
def test_dropout_in_training(path, decomposed):
    """The same elements are dropped as F.dropout drops, whatever the rank; DoRA's second path sees them too."""
    model = build(lora_dropout=0.4, use_dora=decomposed).train()
    layer = layers(model)[0]
    if path == "plain":
        layer.base_layer.register_forward_hook(lambda *_: None)
    x, update = inputs(torch.float64), layer.update_of("default")
    for span in SPANS:
        draw(model, span)
        torch.manual_seed(5)
        dropped = F.dropout(x.reshape(-1, 12), 0.4).view_as(x)
        if decomposed:
            weight, bias = layer.frozen().weight, layer.frozen().bias
            gained = definition(layer, dropped, span) - bias
            s = ALPHA / span.end
            plain = F.linear(dropped, weight) + s * F.linear(
                F.linear(dropped, update.lora_A[: span.end].detach()), update.lora_B[:, : span.end].detach()
            )
            expected_value = (F.linear(x, weight, bias) + gained - F.linear(dropped, weight)).detach()
            assert (plain.detach() - gained).abs().max() > 1e-3  # the magnitudes do matter here
            wanted = torch.autograd.grad(gained.sum(), [update.lora_A, update.lora_B])
        else:
            value = definition(layer, x, span, dropped=dropped)
            expected_value = value.detach()
            wanted = torch.autograd.grad(value.sum(), [update.lora_A, update.lora_B])
        torch.manual_seed(5)
        y = layer(x)
        torch.testing.assert_close(y, expected_value, rtol=1e-12, atol=1e-12)
        for found, right in zip(torch.autograd.grad(y.sum(), [update.lora_A, update.lora_B]), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
def test_frozen_and_all_give_the_same_output_and_input_gradient(kind, decomposed):
    model, x = build(kind, use_dora=decomposed).train(), inputs(torch.float64)
    for b in range(1, R + 1):
        results = []
        for first in (b - 1, 0):
            draw(model, Span(first, b))
            results.append(run(model, x))
        (y, dx, frozen), (y_all, dx_all, trained) = results
        assert torch.equal(y, y_all)
        assert torch.equal(dx, dx_all)
        for name, gradient in frozen.items():
            if "magnitude" in name:
                torch.testing.assert_close(gradient, trained[name])
                continue
            rows, rows_all = (g if "lora_A" in name else g.T for g in (gradient, trained[name]))
            assert [bool(row.any()) for row in rows] == [i == b - 1 for i in range(R)], name
            assert [bool(row.any()) for row in rows_all] == [i < b for i in range(R)], name
            torch.testing.assert_close(rows[b - 1], rows_all[b - 1])


@pytest.mark.parametrize(
    ("path", "kind"), [("fused", "Linear"), ("fused", "Conv1D"), ("plain", "Linear"), ("compiled", "Linear")]
)
@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_beyond_b_is_ever_read(path, kind, decomposed, bad):
    """Forward, backward, merged weight and export at b, with poison planted in the components from b on."""
    torch._dynamo.reset()
    b = 2
    clean, poisoned = build(kind, use_dora=decomposed), build(kind, use_dora=decomposed)
    with torch.no_grad():
        for _, update in updates(poisoned):
            update.lora_A[b:] = bad
            update.lora_B[:, b:] = bad
    x = inputs(torch.float64)
    results = []
    for model in (clean, poisoned):
        draw(model.train(), Span(1, b))
        for layer in layers(model):
            if path == "plain":
                layer.base_layer.register_forward_hook(lambda *_: None)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if path == "compiled" else model
        results.append(run(call, x))
        ranktune.set_rank(model, b)
        results[-1] = (*results[-1], call.eval()(x).detach())
        results[-1] += tuple(layer.get_delta_weight("default") for layer in layers(model))
    (y, dx, grads, *rest), (y_bad, dx_bad, grads_bad, *rest_bad) = results
    assert torch.equal(y, y_bad)
    assert torch.equal(dx, dx_bad)
    for name, gradient in grads.items():
        assert torch.equal(gradient, grads_bad[name].nan_to_num(0) if path == "compiled" else grads_bad[name]), name
    for part, part_bad in zip(rest, rest_bad, strict=True):
        assert torch.equal(part, part_bad)


def test_the_unscaled_outputs_add_up_component_by_component():
    """``b y_b - (b - 1) y_(b-1) = alpha B[:, b-1] (A[b-1] x)`` of what one layer adds."""
    model = build().eval()
    layer, x = layers(model)[0], inputs(torch.float64)
    update, added = layer.update_of("default"), [torch.zeros(2, 5, 12, dtype=torch.float64)]
    for b in range(1, R + 1):
        ranktune.set_rank(model, b)
        added.append(b * (layer(x) - layer.base_layer(x)))
        component = ALPHA * torch.outer(update.lora_B[:, b - 1], update.lora_A[b - 1])
        torch.testing.assert_close(added[b] - added[b - 1], x @ component.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_every_rank_equals_stock_peft_with_the_leading_components(kind, fields):
    model, x = build(kind, **fields).eval(), inputs(torch.float64)
    for b in range(1, R + 1):
        ranktune.set_rank(model, b)
        assert ranktune.ranks(model) == dict.fromkeys(TARGETS, b)
        stock = peft.get_peft_model(
            build_base(kind, torch.float64),
            peft.LoraConfig(r=b, lora_alpha=ALPHA, target_modules=TARGETS, fan_in_fan_out=kind == "Conv1D", **fields),
        ).eval()
        with torch.no_grad():
            for name, update in updates(model):
                layer = stock.get_submodule(f"base_model.model.{name}")
                layer.lora_A["default"].weight.copy_(update.lora_A[:b])
                layer.lora_B["default"].weight.copy_(update.lora_B[:, :b])
                if update.decomposed:
                    layer.lora_magnitude_vector["default"].weight.copy_(update.lora_magnitude_vector)
        torch.testing.assert_close(model(x), stock(x), rtol=1e-11, atol=1e-11)


def test_backward_does_the_work_of_the_trained_component_only():
    """Exactly the products of the formula: forward and dx at rank b, dA and dB at rank 1, and nothing concatenated."""
    n, size, out = 6, 10, 14
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, size, generator=generator, requires_grad=True)
    weight = torch.randn(out, size, generator=generator)
    A = torch.randn(R, size, generator=generator, requires_grad=True)
    B = torch.randn(out, R, generator=generator, requires_grad=True)
    for span in SPANS:
        first, b = span
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as forward:
            y = low_rank_linear(x, weight, None, A, B, 0.5, span=span)
        assert forward.get_total_flops() == 2 * n * (size * out + b * (size + out))
        seen = Names()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as backward, seen:
            y.sum().backward()
        work = n * (size * out + b * (size + out) + (b - first) * (size + out))
        assert backward.get_total_flops() == 2 * work
        assert not {name for name in seen.names if "cat" in name or "stack" in name}


# The counter knows addmm, not what is added in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_factors_and_gradients_in_float32(decomposed, device_dtype):
    model = build(dtype=torch.float32, use_dora=decomposed).train()
    draw(model, Span(1, 3))
    _, _, exact = run(model, inputs())
    with torch.autocast("cpu", dtype=device_dtype):
        y = model(inputs())
    assert y.dtype == device_dtype
    model.zero_grad()
    y.float().sum().backward()
    for name, parameter in model.named_parameters():
        if "ranktune_" in name:
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad, exact[name], rtol=0.1, atol=0.5)
            if "lora_A" in name:
                assert parameter.grad[1:3].any(1).all()
                assert not parameter.grad[[0, 3]].any()


def test_a_low_precision_adapter_trains_at_a_drawn_rank():
    model = build(dtype=torch.bfloat16).train()
    for _, update in updates(model):
        update.to(torch.bfloat16)
    draw(model, Span(2, 3))
    _, _, grads = run(model, inputs(torch.bfloat16))
    for name, gradient in grads.items():
        rows = gradient if "lora_A" in name else gradient.T
        assert [bool(row.any()) for row in rows] == [False, False, True, False]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
def test_checkpointing_recomputes_at_the_same_rank(use_reentrant, decomposed):
    """A checkpoint runs forward again in backward: nothing may have been drawn in between."""
    model = build(use_dora=decomposed, lora_dropout=0.3).train()
    for span in SPANS:
        draw(model, span)
        torch.manual_seed(1)
        expected = run(model, inputs(torch.float64))
        checkpointed = partial(torch.utils.checkpoint.checkpoint, model.forward, use_reentrant=use_reentrant)
        x = inputs(torch.float64).requires_grad_()
        model.zero_grad()
        torch.manual_seed(1)
        y = checkpointed(x)
        y.sum().backward()
        assert torch.equal(y, expected[0])
        assert torch.equal(x.grad, expected[1])
        for name, gradient in expected[2].items():
            assert torch.equal(dict(model.named_parameters())[name].grad, gradient)


@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
def test_one_compiled_graph_serves_every_rank(decomposed):
    """More ranks than Dynamo's limit of recompilations, in training and in evaluation."""
    torch._dynamo.reset()
    r = 12
    model = build(r=r, use_dora=decomposed, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    drawn = draw(model, Span(0, 1))
    x = inputs()
    run(compiled.train(), x)
    compiled.eval()(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b in range(1, r + 1):
            drawn.spans = lambda _, b=b: Span(b - 1, b)
            drawn.at(0)
            expected = run(model.train(), x)
            found = run(compiled.train(), x)
            for right, value in zip(expected[:2], found[:2], strict=True):
                torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)
            for name, gradient in expected[2].items():
                compiled_name = f"_orig_mod.{name}"
                torch.testing.assert_close(found[2][compiled_name], gradient, rtol=1e-3, atol=1e-3)
            ranktune.set_rank(model, b)
            torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_norms_are_those_of_the_rank_in_use():
    """Cached norms of one rank must not serve another, in evaluation and between training and evaluation."""
    model = build(use_dora=True)
    layer, x = layers(model)[0], inputs(torch.float64)
    for b in (4, 1, 3, 1, 4):
        ranktune.set_rank(model, b)
        expected = definition(layer, x, Span(0, b))
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)
        draw(model, Span(1, 2))
        torch.testing.assert_close(layer.train()(x), definition(layer, x, Span(1, 2)), rtol=1e-12, atol=1e-12)
        draw(model, Span(0, 2))
        torch.testing.assert_close(layer.train()(x), definition(layer, x, Span(0, 2)), rtol=1e-12, atol=1e-12)


def test_evaluation_and_merging_see_the_rank_that_was_set_not_the_one_drawn():
    model, x = build(), inputs(torch.float64)
    full = model.eval()(x)
    draw(model, Span(0, 1))
    assert torch.equal(model.eval()(x), full)
    model.train()
    assert not torch.equal(model(x), full)
    deltas = [layer.get_delta_weight("default") for layer in layers(model)]
    for layer, delta in zip(layers(model), deltas, strict=True):
        update = layer.update_of("default")
        torch.testing.assert_close(delta, ALPHA / R * update.lora_B @ update.lora_A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decomposed", [False, True], ids=["lora", "dora"])
def test_merging_at_a_rank_and_back(decomposed):
    model, x = build(dtype=torch.float32, use_dora=decomposed).eval(), inputs()
    weights = [layer.weight.clone() for layer in layers(model)]
    for b in (2, 4):
        ranktune.set_rank(model, b)
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ranktune.ConfigError, match=f"merged into the base weights at rank {b}"):
            ranktune.set_rank(model, 1)
        assert ranktune.ranks(model) == dict.fromkeys(TARGETS, b)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers(model), weights, strict=True))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_rank_that_was_set_is_saved_and_nothing_is_lost(low_cpu_mem_usage, tmp_path):
    model, x = build(dtype=torch.float32).eval(), inputs()
    full = model(x)
    ranktune.set_rank(model, 2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        build_base("Linear"), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert ranktune.ranks(loaded, "other") == dict.fromkeys(TARGETS, 2)
    assert torch.equal(loaded(x), model(x))
    ranktune.set_rank(loaded, R, "other")
    assert torch.equal(loaded(x), full)


def test_the_adapter_is_as_large_as_a_lora_of_the_highest_rank():
    ours = build(perturbed=False)
    lora = peft.get_peft_model(build_base("Linear"), peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, lora)]
    assert counts[0] == counts[1] == ranktune.active_parameters(ours)
    state = [peft.get_peft_model_state_dict(model) for model in (ours, lora)]
    tensors = {name: value for name, value in state[0].items() if "rank_" not in name.rpartition(".")[2]}
    assert sum(value.numel() for value in tensors.values()) == sum(value.numel() for value in state[1].values())


def test_compacting_at_a_rank_cuts_for_good(tmp_path):
    model, x = build(dtype=torch.float32).eval(), inputs()
    ranktune.set_rank(model, 3)
    expected = model(x)
    assert ranktune.compact(model) == dict.fromkeys(TARGETS, 3)
    assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path).eval()
    assert torch.equal(loaded(x), expected)
    ranktune.set_rank(loaded, 2)
    with pytest.raises(ranktune.ConfigError, match=r"\[1, 2, 3\]"):
        ranktune.set_rank(loaded, 4)


def test_components_are_not_dropped_while_their_ranks_are_drawn():
    model = build()
    draw(model, Span(2, 3))
    ranktune.set_rank(model, 2)
    with pytest.raises(ranktune.ConfigError, match="training ranks up to 4, and 2 components would be left"):
        ranktune.compact(model)
    assert {update.capacity for _, update in updates(model)} == {4}
    for _, update in updates(model):
        update.follow(None)
        update.keep_components(torch.tensor([0]))
        assert update.rank == update.capacity == 1
