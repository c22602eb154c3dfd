"""The PEFT host: which path a layer takes, what is refused, and transformers models from folder to folder."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import ranktune
from ranktune import ConfigError, DoraConfig, RankConfig
from ranktune.layer import RankLayer
from tests.methods import TARGETS, Linears, build_base, inputs, perturb

CONFIGS = {"lora": RankConfig, "dora": DoraConfig}


@pytest.fixture(params=CONFIGS)
def config_class(request):
    return CONFIGS[request.param]


def adapted(config_class, base=None, **fields):
    base = build_base("Linear") if base is None else base
    return perturb(peft.get_peft_model(base, config_class(r=4, target_modules=TARGETS, **fields)))


def step(model, x):
    model.zero_grad()
    torch.manual_seed(2)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for n, p in sorted(model.named_parameters()) if "ranktune_" in n)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reason", ["hook", "pre-hook", "replaced forward", "subclass", "trainable bias"])
def test_layers_that_cannot_be_fused_compute_the_same(config_class, dropout, reason):
    """Whatever hangs on the base layer's call is still called; the result is that of the fused op."""
    fused, plain = (adapted(config_class, lora_dropout=dropout).train() for _ in range(2))
    called = []
    for layer in (module for module in plain.modules() if isinstance(module, RankLayer)):
        base = layer.base_layer
        if reason == "hook":
            base.register_forward_hook(lambda *_: called.append(1))
        elif reason == "pre-hook":
            base.register_forward_pre_hook(lambda *_: called.append(1))
        elif reason == "replaced forward":
            original = base.forward
            base.forward = lambda x, original=original: called.append(1) or original(x)
        elif reason == "subclass":
            base.__class__ = type("Subclass", (nn.Linear,), {"forward": _counted_forward(called)})
        elif base.bias is not None:
            base.bias.requires_grad_(True)
    for ours, theirs in zip(step(fused, inputs()), step(plain, inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if reason == "trainable bias":
        assert plain.base_model.model.square.base_layer.bias.grad.abs().max() > 0
    else:
        assert len(called) == len(TARGETS)


def _counted_forward(called):
    def forward(self, x):
        called.append(1)
        return nn.functional.linear(x, self.weight, self.bias)

    return forward


def test_a_trainable_base_weight_gets_its_gradient(config_class):
    model = adapted(config_class)
    weight = model.base_model.model.wide.base_layer.weight
    weight.requires_grad_(True)
    step(model, inputs())
    assert weight.grad.abs().max() > 0


def test_zero_rows_stay_finite_and_are_reported(caplog):
    base = build_base("Linear")
    with torch.no_grad():
        base.wide.weight[[2, 5]] = 0.0
    expected = base(inputs())
    with caplog.at_level(logging.WARNING, logger="ranktune"):
        model = peft.get_peft_model(base, DoraConfig(r=4, target_modules=TARGETS))
    assert [record.message for record in caplog.records if "wide: 2 rows" in record.message]
    assert torch.equal(model(inputs()), expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.isfinite(merged(inputs())).all()


def test_row_norms_of_the_merged_weight_are_the_magnitudes():
    """The paper's invariant: whatever A and B become, row j of W' has norm |m_j|."""
    model = adapted(DoraConfig).double()
    for layer in (module for module in model.modules() if isinstance(module, RankLayer)):
        merged = layer.weight + layer.get_delta_weight("default")
        magnitude = layer.update_of("default").lora_magnitude_vector
        torch.testing.assert_close(merged.norm(dim=1), magnitude.abs(), rtol=1e-9, atol=0)


def test_the_exact_gradient_is_the_detached_one_projected():
    """Detaching the norm adds the radial part only; the magnitude's gradient is the same."""
    grads = {}
    for detach in (True, False):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            build_base("Linear", torch.float64), DoraConfig(r=4, target_modules=["narrow"], detach_norm=detach)
        )
        perturb(model)
        step(model, inputs(torch.float64))
        update = model.base_model.model.narrow.update_of("default")
        grads[detach] = {name: parameter.grad for name, parameter in update.named_parameters()}
    torch.testing.assert_close(grads[True]["lora_magnitude_vector"], grads[False]["lora_magnitude_vector"])
    layer = model.base_model.model.narrow
    update, scale = layer.update_of("default"), layer.scaling["default"]
    V = (layer.weight + scale * update.lora_B @ update.lora_A).detach()
    n, m = V.norm(dim=1), update.lora_magnitude_vector.detach()
    # dL/dm_j = <G_j, V_j / n_j>, so the radial part of dL/dV_j is (m_j / n_j) dm_j V_j / n_j (equation 8).
    radial = ((m / n) * grads[True]["lora_magnitude_vector"] / n).unsqueeze(1) * V
    difference = {name: grads[True][name] - grads[False][name] for name in ("lora_A", "lora_B")}
    torch.testing.assert_close(difference["lora_B"], scale * radial @ update.lora_A.T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(difference["lora_A"], scale * update.lora_B.T @ radial, rtol=1e-8, atol=1e-10)
    assert difference["lora_B"].abs().max() > 1e-3


@pytest.mark.parametrize("targets", [["square", "narow"], ["narow"]])
def test_every_target_must_match(config_class, targets):
    with pytest.raises(
        ConfigError, match=r"\['narow'\] not found in the base model.*Did you mean 'narrow'\?"
    ) as caught:
        peft.get_peft_model(build_base("Linear"), config_class(target_modules=targets))
    assert isinstance(caught.value, NoMatchingPeftModuleError)


def test_the_inside_of_an_adapted_layer_is_no_target(config_class):
    model = adapted(config_class)
    with pytest.raises(ConfigError, match=r"end in: head, narrow, square, wide\."):
        model.add_adapter("second", config_class(target_modules=["base_layer"]))


def test_a_saved_adapter_loads_on_a_model_that_lacks_one_of_its_targets(config_class, tmp_path):
    adapted(config_class).save_pretrained(tmp_path)

    class Shorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.square = nn.Linear(12, 12)

    loaded = peft.PeftModel.from_pretrained(Shorter(), tmp_path)
    assert set(ranktune.ranks(loaded)) == {"square"}


def test_a_refused_adapter_leaves_the_model_usable(config_class):
    model = adapted(config_class).eval()
    expected = model(inputs())
    with pytest.raises(ConfigError):
        model.add_adapter("broken", config_class(target_modules=["nowhere"]))
    assert "broken" not in model.peft_config
    assert torch.equal(model(inputs()), expected)


def test_an_embedding_is_refused_by_name(config_class):
    base = nn.ModuleDict({"table": nn.Embedding(4, 3), "out": nn.Linear(3, 2)})
    with pytest.raises(ConfigError, match=r"'table' is a Embedding.*exclude_modules"):
        peft.get_peft_model(base, config_class(target_modules=["table", "out"]))


def test_adapters_per_sample_are_refused_rather_than_ignored(config_class):
    model = adapted(config_class).eval()
    with pytest.raises(ConfigError, match="adapter_names"):
        model(inputs(), adapter_names=["default", "__base__"])


def test_unmerging_what_is_not_merged_says_so(config_class):
    layer = adapted(config_class).base_model.model.square
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=20))


def test_auto_peft_model_loads_a_saved_adapter_with_its_base(config_class, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = config_class(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = perturb(peft.get_peft_model(base, config)).eval()
    tokens = torch.arange(8).unsqueeze(0)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    for loaded in (
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(loaded.eval()(tokens).logits, expected)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, :8], tokens)


def test_all_linear_adapts_every_linear_layer_but_the_head(config_class):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40, num_labels=3
    )
    model = peft.get_peft_model(
        BertForSequenceClassification(config), config_class(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    )
    adapted_names = set(ranktune.ranks(model))
    assert len([name for name in adapted_names if ".layer." in name]) == 2 * 6
    assert not any("classifier" in name for name in adapted_names)
    assert model.base_model.model.classifier.modules_to_save.default.weight.requires_grad


def test_ranks_and_sizes_of_one_adapter_among_several(config_class):
    model = peft.get_peft_model(Linears(), config_class(r=4, target_modules=TARGETS))
    model.add_adapter("small", config_class(r=1, target_modules=["wide"]))
    assert ranktune.ranks(model, "small") == {"wide": 1}
    magnitude = 20 if config_class is DoraConfig else 0
    assert ranktune.active_parameters(model, "small") == 12 + 20 + magnitude
    assert ranktune.ranks(model) == {"square": 4, "wide": 4, "narrow": 4}


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "plain"])
def test_evaluation_drops_nothing(config_class, hooked):
    model, without = adapted(config_class, lora_dropout=0.5).eval(), adapted(config_class).eval()
    if hooked:
        for layer in (module for module in model.modules() if isinstance(module, RankLayer)):
            layer.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(inputs()), without(inputs()), rtol=1e-5, atol=1e-5)


def test_a_magnitude_of_zero_still_gets_its_gradient():
    """The gain's gradient is read from the output, which says nothing where the gain is zero."""
    fused, plain = adapted(DoraConfig), adapted(DoraConfig)
    for model in (fused, plain):
        with torch.no_grad():
            model.base_model.model.narrow.update_of("default").lora_magnitude_vector[2] = 0.0
    for layer in (module for module in plain.modules() if isinstance(module, RankLayer)):
        layer.base_layer.register_forward_hook(lambda *_: None)
    for ours, theirs in zip(step(fused, inputs()), step(plain, inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_exact_norm_of_a_cancelled_row_is_right():
    """With detach_norm=False too, a row that the update takes to almost nothing is computed densely."""
    model = adapted(DoraConfig, detach_norm=False).eval()
    layer = model.base_model.model.narrow
    update, scale = layer.update_of("default"), layer.scaling["default"]
    with torch.no_grad():
        layer.base_layer.weight.copy_(-scale * update.lora_B @ update.lora_A)
        layer.base_layer.weight.add_(1e-4 * torch.randn(7, 20, generator=torch.Generator().manual_seed(0)))
        expected = model(inputs())
    torch.testing.assert_close(model(inputs()).detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_base_layer_are_called(config_class, kind):
    model = adapted(config_class)
    called = []
    for layer in (module for module in model.modules() if isinstance(module, RankLayer)):
        getattr(layer.base_layer, kind)(lambda *_: called.append(1))
    model(inputs().requires_grad_()).sum().backward()
    assert len(called) == len(TARGETS)


def test_a_weight_of_a_tensor_subclass_is_left_to_the_base_layer(config_class):
    """Quantised and sharded weights are subclasses whose own operators have to run."""
    layer = adapted(config_class).base_model.model.wide
    assert layer._can_fuse()
    subclass = type("Subclass", (torch.Tensor,), {})
    layer.base_layer._parameters["weight"] = layer.base_layer.weight.detach().as_subclass(subclass)
    assert not layer._can_fuse()


def test_arguments_that_the_base_layer_does_not_take_are_not_swallowed(config_class):
    layer = adapted(config_class).base_model.model.square
    with pytest.raises(TypeError):
        layer(inputs(), 1)
    with pytest.raises(TypeError):
        layer(inputs(), scale=1)


def test_layers_that_cannot_be_fused_keep_the_dtype(config_class):
    model = adapted(config_class, build_base("Linear", torch.bfloat16))
    layer = model.base_model.model.square
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert layer(inputs(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dora_dropout", ["both_paths", "low_rank_path"])
def test_both_dropouts_are_the_same_fused_and_plain(dora_dropout):
    fused, plain = (adapted(DoraConfig, lora_dropout=0.4, dora_dropout=dora_dropout) for _ in range(2))
    for layer in (module for module in plain.modules() if isinstance(module, RankLayer)):
        layer.base_layer.register_forward_hook(lambda *_: None)
    for ours, theirs in zip(step(fused, inputs()), step(plain, inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_second_adapter_is_not_trained_until_it_is_active(config_class):
    """Nor on modules that only it adapts."""
    model = peft.get_peft_model(Linears(), config_class(r=2, target_modules=["square"]))
    model.add_adapter("second", config_class(r=2, target_modules=["square", "wide"]))

    def trained(adapter):
        return {p.requires_grad for name, p in model.named_parameters() if f"ranktune_update.{adapter}." in name}

    assert (trained("default"), trained("second")) == ({True}, {False})
    model.set_adapter("second")
    assert (trained("default"), trained("second")) == ({False}, {True})


def test_an_adapter_added_beside_a_merged_one_starts_as_the_identity(config_class):
    """Its magnitude is that of the original weight, not of the one another adapter is merged into."""
    model = adapted(config_class).eval()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config_class(r=2, target_modules=TARGETS))
    model.set_adapter("second")
    assert torch.equal(model(inputs()), build_base("Linear")(inputs()))


def test_several_merged_adapters_are_rounded_once(config_class):
    layer = adapted(config_class, build_base("Linear", torch.bfloat16)).base_model.model.wide
    for number in (2, 3, 4):
        layer.update_layer(f"adapter{number}", config_class(r=2), "wide")
        perturb(layer, scale=0.01, seed=number)
    names = list(layer.ranktune_update)
    exact = layer.weight.float() + sum(layer._delta_weight(name) for name in names)
    layer.merge(adapter_names=names)
    assert torch.equal(layer.weight, exact.bfloat16())


class Halved:
    """Stands in for PEFT's quantisation backends: the stored weight is half of the real one."""

    backend_name = "halved"
    supports_merge = True

    def get_base_weight(self, base_layer):
        return base_layer.weight.data * 2

    def maybe_clone_base_result(self, result):
        return result.clone()


def quantised(config_class):
    """A model whose base layers store halved weights, and the same model with ordinary ones."""
    plain, stored = adapted(config_class), adapted(config_class)
    for layer in (module for module in stored.modules() if isinstance(module, RankLayer)):
        base = layer.base_layer
        base.weight.data = base.weight.data / 2
        base.forward = lambda x, base=base: nn.functional.linear(x, base.weight * 2, base.bias)
        layer.quantization_backend = Halved()
    return plain, stored


def test_a_quantised_base_is_called_and_composed_with(config_class):
    """The base layer's own forward does its product; norms come from the dequantised weight."""
    for ours, theirs in zip(*(step(model, inputs()) for model in quantised(config_class)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_merging_into_a_quantised_weight_is_refused(config_class):
    _, stored = quantised(config_class)
    before = stored.base_model.model.square.base_layer.weight.clone()
    with pytest.raises(ConfigError, match=r"merging into a halved weight.*load the base model unquantised"):
        stored.merge_adapter()
    assert torch.equal(stored.base_model.model.square.base_layer.weight, before)
    assert not stored.base_model.model.square.merged
