"""Our layers against stock PEFT's LoRA and DoRA with the same weights: outputs, gradients, merging, training."""

from __future__ import annotations

import peft
import pytest
import torch

from ranktune import DoraConfig, RankConfig
from tests.methods import TARGETS, build_base, inputs, perturb

PAIRS = {"lora": RankConfig, "dora": DoraConfig}
# PEFT takes DoRA's norms in the weight's own dtype; in bfloat16 they are off by up to 2^-8, ours are not.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.06}


def our_name(name: str) -> str:
    """PEFT's parameter name to ours: `wide.lora_A.default.weight` is `wide.ranktune_update.default.lora_A`."""
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.default.weight", f".ranktune_update.default.{part}")
    return name


def twins(method: str, kind: str, dtype: torch.dtype, dropout: float = 0.0, **fields):
    """Our model and stock PEFT's with identical adapter weights, far from the start."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "lora_dropout": dropout, **fields}
    ours = perturb(peft.get_peft_model(build_base(kind, dtype), PAIRS[method](**fields)))
    stock = peft.LoraConfig(use_dora=method == "dora", fan_in_fan_out=kind == "Conv1D", **fields)
    theirs = peft.get_peft_model(build_base(kind, dtype), stock)
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[our_name(name)])
    return ours, theirs


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = model(x)
    y.double().square().sum().backward()
    found = {our_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **found}


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(
    ("dtype", "dropout"),
    # Not bfloat16 with dropout: PEFT draws its mask in the adapter's float32, we in the input's bfloat16.
    [(torch.float64, 0.0), (torch.float64, 0.4), (torch.float32, 0.0), (torch.float32, 0.4), (torch.bfloat16, 0.0)],
)
def test_outputs_and_gradients_agree(method, kind, dtype, dropout):
    """With dropout too: for DoRA that is the two-path semantics, under the same random draws."""
    ours, theirs = twins(method, kind, dtype, dropout)
    x = inputs(dtype)
    y, grads = gradients(ours.train(), x)
    expected, expected_grads = gradients(theirs.train(), x)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        reference = expected_grads[name]
        limit = tolerance * reference.abs().max().item()
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_merged_weights_agree(method, kind):
    ours, theirs = twins(method, kind, torch.float32)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("rslora", [True, False])
def test_patterns_and_scales_mean_the_same(method, rslora):
    fields = {"rank_pattern": {"wide": 2, ".*row": 3}, "alpha_pattern": {"wide": 5}, "use_rslora": rslora}
    ours, theirs = twins(method, "Linear", torch.float64, **fields)
    torch.testing.assert_close(ours(inputs(torch.float64)), theirs(inputs(torch.float64)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", PAIRS)
def test_thirty_steps_of_adamw_follow_the_same_path(method):
    ours, theirs = twins(method, "Linear", torch.float64, dropout=0.1)
    losses = []
    for model in (ours.train(), theirs.train()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        torch.manual_seed(0)
        path = []
        for step in range(30):
            loss = (model(inputs(torch.float64, seed=step)) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            path.append(loss.item())
        losses.append(path)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


@pytest.mark.parametrize("method", PAIRS)
def test_under_autocast_both_agree_within_its_precision(method):
    ours, theirs = twins(method, "Linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = gradients(ours, inputs())
        expected, expected_grads = gradients(theirs, inputs())
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    for name, gradient in grads.items():
        assert gradient.dtype == expected_grads[name].dtype
        cosine = torch.cosine_similarity(gradient.flatten(), expected_grads[name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_peft_converts_our_adapters_to_lora():
    """`get_delta_weight` is all that PEFT's converter needs."""
    ours, _ = twins("lora", "Linear", torch.float32)
    config, tensors = peft.convert_to_lora(ours, rank=4)
    stock = peft.get_peft_model(build_base("Linear"), config)
    peft.set_peft_model_state_dict(stock, tensors)
    torch.testing.assert_close(stock.eval()(inputs()), ours.eval()(inputs()), rtol=1e-3, atol=1e-3)
