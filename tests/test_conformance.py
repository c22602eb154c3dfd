"""Every method against every property that users of PEFT take for granted. The rows are in tests/methods.py."""

from __future__ import annotations

import copy
import json
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file

import ranktune
from ranktune import adapters
from tests.methods import ROWS, TARGETS, build_base, inputs, perturb

# Conformance is about the adapter alone; what a controller does with it has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
KINDS = ["Linear", "Conv1D"]


@pytest.fixture(params=ROWS, ids=str)
def row(request):
    return request.param


@pytest.fixture(params=[row for row in ROWS if row.mergeable], ids=str)
def merging_row(request):
    return request.param


@pytest.fixture(params=[row for row in ROWS if not row.mergeable], ids=str)
def unmergeable_row(request):
    return request.param


def adapted(row, kind="Linear", dtype=torch.float32, perturbed=True, **fields):
    model = peft.get_peft_model(build_base(kind, dtype), row.config(**{"target_modules": TARGETS, **fields}))
    return perturb(model) if perturbed else model


def adapter_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "ranktune_" in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_fresh_adapter_changes_no_bit(row, kind, dtype, mode):
    base = build_base(kind, dtype)
    expected = base(inputs(dtype))
    model = adapted(row, kind, dtype, perturbed=False)
    assert torch.equal(getattr(model, mode)()(inputs(dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fresh_adapter_changes_no_bit_with_dropout_in_training(row, dtype):
    expected = build_base("Linear", dtype)(inputs(dtype))
    model = adapted(row, "Linear", dtype, perturbed=False, lora_dropout=0.5)
    assert torch.equal(model.train()(inputs(dtype)), expected)


def test_casting_the_model_afterwards_keeps_the_identity(row):
    """`model.to(bfloat16)` must not round magnitudes: the row norms would no longer match them."""
    model = adapted(row, perturbed=False).to(torch.bfloat16)
    expected = build_base("Linear").to(torch.bfloat16)(inputs(torch.bfloat16))
    tolerance = 0 if not row.config().use_dora else 1e-2
    torch.testing.assert_close(model(inputs(torch.bfloat16)), expected, rtol=tolerance, atol=tolerance)
    for name, parameter in adapter_parameters(model).items():
        if "magnitude" in name:
            assert parameter.dtype == torch.float32


def test_a_random_start_is_far_from_the_identity(row):
    model = adapted(row, perturbed=False, init_weights=False)
    assert (model(inputs()) - build_base("Linear")(inputs())).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_adapter_tensor_and_nothing_else(row, kind):
    model = adapted(row, kind)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(inputs()).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("ranktune_" in name), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(merging_row, kind, dtype):
    model = adapted(merging_row, kind, dtype).eval()
    x = inputs(dtype)
    expected = model(x)
    weights = {name: layer.weight.clone() for name, layer in _layers(model)}
    model.merge_adapter()
    assert all(layer.merged for _, layer in _layers(model))
    assert not torch.equal(_layers(model)[0][1].weight, weights[_layers(model)[0][0]])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    for _ in range(3):
        model.unmerge_adapter()
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    for name, layer in _layers(model):
        assert torch.equal(layer.weight, weights[name])
    assert torch.equal(model(x), expected)


def _layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ranktune.layer.RankLayer)]


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_leaves_a_plain_model(merging_row, kind):
    model = adapted(merging_row, kind).eval()
    expected = model(inputs())
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(build_base(kind))
    assert not [name for name, _ in merged.named_parameters() if "ranktune" in name]
    torch.testing.assert_close(merged(inputs()), expected, rtol=1e-5, atol=1e-5)


def test_rows_say_whether_they_merge(row):
    model = adapted(row)
    assert {update.mergeable for _, update in adapters.updates(model)} == {row.mergeable}
    assert {layer.supports_lora_conversion("default") for _, layer in _layers(model)} == {row.mergeable}


@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_on_its_input_is_not_merged(unmergeable_row, kind):
    """Every way is refused by name, with what to do instead, before anything has changed in any layer."""
    model = adapted(unmergeable_row, kind, target_modules=["narrow"])
    model.add_adapter("plain", ranktune.RankConfig(target_modules=["square"]))
    model.base_model.set_adapter(["default", "plain"])
    perturb(model).eval()
    expected = model(inputs())
    layer = _layers(model)[-1][1]
    for way in (
        model.merge_adapter,
        model.merge_and_unload,
        partial(model.merge_and_unload, safe_merge=True, adapter_names=["plain", "default"]),
        layer.merge,
        partial(layer.get_delta_weight, "default"),
    ):
        with pytest.raises(ranktune.ConfigError, match=r"mor adapter.*mean_gate"):
            way()
        assert not any(layer.merged for _, layer in _layers(model))
        assert torch.equal(model(inputs()), expected)
    assert _layers(model.merge_and_unload(adapter_names=["plain"])) == []
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(adapted(unmergeable_row, kind), 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_and_changes_nothing(merging_row, bad):
    model = adapted(merging_row).eval()
    layer = _layers(model)[1][1]
    with torch.no_grad():
        layer.update_of("default").lora_B[0, 0] = bad
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_the_delta_weight_is_what_forward_adds(merging_row, kind):
    model = adapted(merging_row, kind).eval()
    for _, layer in _layers(model):
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.weight.shape
        x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(4))
        matrix = delta if kind == "Linear" else delta.T
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ matrix.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_and_loading_gives_the_same_outputs(row, kind, dtype, tmp_path):
    model = adapted(row, kind, dtype).eval()
    expected = model(inputs(dtype))
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            build_base(kind, dtype), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert type(loaded.peft_config["other"]) is row.config_class
        assert torch.equal(loaded.eval()(inputs(dtype)), expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parameters = {name: tensor for name, tensor in saved.items() if "rank_" not in name.rpartition(".")[2]}
    assert len(parameters) == len(adapter_parameters(model))
    assert sum(tensor.numel() for tensor in parameters.values()) == ranktune.active_parameters(model)


def test_the_saved_config_comes_back_field_for_field(row, tmp_path):
    ranks = {} if row.config_class.gated else {"wide": 2}
    config = row.config(target_modules=TARGETS, lora_dropout=0.1, rank_pattern=ranks, alpha_pattern={"wide": 3})
    config.save_pretrained(tmp_path)
    first = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(first)["method"] == row.config_class.method_name
    for loaded in (peft.PeftConfig.from_pretrained(tmp_path), row.config_class.from_pretrained(tmp_path)):
        assert type(loaded) is row.config_class
        assert loaded == config


def test_two_adapters_switch_add_and_delete(row):
    x = inputs()
    model = adapted(row).eval()
    first = model(x)
    model.add_adapter("second", row.config(target_modules=["square", "narrow"], r=2))
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    assert torch.equal(model(x), build_base("Linear")(x))
    perturb(model, seed=5)
    second = model(x)
    model.set_adapter("default")
    assert (model(x) - second).abs().max() > 1e-3
    first = model(x)

    layer = _layers(model)[0][1]
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
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    assert torch.equal(model(x), first)
    with model.disable_adapter():
        assert torch.equal(model(x), build_base("Linear")(x))
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_two_adapters_merge_as_they_run(merging_row, one_by_one):
    """With a magnitude, every norm refers to the original weight, also when another adapter is in it already."""
    model = adapted(merging_row).eval()
    model.add_adapter("second", merging_row.config(target_modules=TARGETS, r=2))
    perturb(model, seed=5)
    model.base_model.set_adapter(["default", "second"])
    expected = model(inputs())
    if one_by_one:
        model.merge_adapter(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(adapter_names=["second"])
    else:
        model.merge_adapter(adapter_names=["default", "second"])
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(inputs()), expected)


def test_disabling_a_merged_adapter_gives_the_base_back(merging_row):
    model = adapted(merging_row).eval()
    expected = model(inputs())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), build_base("Linear")(inputs()))
    assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(row, use_reentrant):
    x = inputs().requires_grad_()
    gradients = []
    for checkpointed in (False, True):
        model = adapted(row, lora_dropout=0.3).train()
        torch.manual_seed(11)
        run = partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=use_reentrant) if checkpointed else model
        y = run(x)
        y.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on autograd nodes
@pytest.mark.parametrize(("kind", "dropout"), [("Linear", 0.0), ("Conv1D", 0.3)])
def test_compiles_whole_and_agrees_with_eager(row, kind, dropout):
    """`fullgraph` refuses any graph break. The eager backend traces everything and compiles nothing."""
    torch._dynamo.reset()
    model = adapted(row, kind, lora_dropout=dropout).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for callable_ in (model, compiled):
        model.zero_grad()
        torch.manual_seed(1)
        y = callable_(inputs())
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in adapter_parameters(model).values())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)


def test_a_deep_copy_is_independent(row):
    model = adapted(row).eval()
    expected = model(inputs())
    clone = copy.deepcopy(model)
    perturb(clone, seed=8)
    assert torch.equal(model(inputs()), expected)
    assert not torch.equal(clone(inputs()), expected)


def test_inference_mode_and_training_can_alternate(row):
    model = adapted(row)
    with torch.inference_mode():
        model.eval()(inputs())
    model.train()(inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())


def test_patterns_set_the_rank_and_the_scale(row):
    if row.config_class.gated:
        with pytest.raises(ranktune.ConfigError, match="rank_pattern cannot be used"):
            row.config(rank_pattern={"wide": 2})
        return
    model = adapted(
        row,
        perturbed=False,
        rank_pattern={"wide": 2, "narrow": 3},
        alpha_pattern={"narrow": 9},
        modules_to_save=["head"],
    )
    assert ranktune.ranks(model) == {"square": 4, "wide": 2, "narrow": 3}
    assert ranktune.total_rank(model) == 9
    layers = {name.rpartition(".")[2]: layer for name, layer in _layers(model)}
    root = (lambda r: r**0.5) if row.config().use_rslora else float
    assert layers["square"].scaling["default"] == pytest.approx(6 / root(4))
    assert layers["wide"].scaling["default"] == pytest.approx(6 / root(2))
    assert layers["narrow"].scaling["default"] == pytest.approx(9 / root(3))


def test_parameter_groups_decay_no_vector(row):
    model = adapted(row, modules_to_save=["head"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = ranktune.parameter_groups(model, lr=0.1, weight_decay=0.01)
    counted = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(counted) == sorted(trainable)
    for group in groups:
        assert group["lr"] == 0.1
        for parameter in group["params"]:
            decayed = parameter.ndim > 1 and names[id(parameter)].rpartition(".")[2] not in row.undecayed
            assert group["weight_decay"] == (0.01 if decayed else 0.0)
