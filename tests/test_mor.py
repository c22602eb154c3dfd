"""Mixture of Ranks as an adapter: the specification's invariants, its configuration and its start."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ranktune
from ranktune import ConfigError, MorConfig, RankConfig
from ranktune.adapters import updates
from ranktune.layer import RankLayer
from ranktune.report.tables import plan_table
from ranktune.run.targets import plan
from tests.methods import TARGETS, build_base, inputs, perturb

FIELDS = {"r": 4, "num_experts": 3, "lora_dropout": 0.0, "target_modules": TARGETS}


def adapted(perturbed=True, dtype=torch.float64, **fields):
    model = peft.get_peft_model(build_base("Linear", dtype), MorConfig(**{**FIELDS, **fields}))
    return (perturb(model) if perturbed else model).eval()


def layers(model):
    return {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, RankLayer)}


def gradients(model, x=None):
    model.zero_grad()
    model(inputs(torch.float64) if x is None else x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def token_update(layer, token):
    """dW(x) [out, in] at one token, from the definition."""
    update = layer.update_of("default")
    gates = torch.softmax(update.router.double() @ token.double(), 0)
    return layer.scaling["default"] * sum(
        gates[i] * update.expert_B[i].diag() @ update.lora_B @ update.expert_A[i].diag() @ update.lora_A
        for i in range(update.num_experts)
    )


def test_every_token_gets_its_own_update_of_rank_r_at_most():
    """The layer computes W x + dW(x) x, and dW(x) has rank r and the rows of A, however many experts there are."""
    for layer in layers(adapted(r=3, num_experts=5)).values():
        x = torch.randn(6, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        A = layer.update_of("default").lora_A
        seen = []
        for token, y in zip(x, layer(x), strict=True):
            delta = token_update(layer, token)
            torch.testing.assert_close(y, layer.base_layer(token) + delta @ token, rtol=1e-10, atol=1e-10)
            assert torch.linalg.matrix_rank(delta) == 3
            assert torch.linalg.matrix_rank(torch.cat([A, delta]), rtol=1e-9) == 3
            seen.append(delta)
        # Across tokens the columns span more than r dimensions: what the paper's title means.
        assert torch.linalg.matrix_rank(torch.cat(seen, 1)) == min(15, layer.out_features, 18)


def test_gates_are_a_distribution_per_token_in_float32():
    for dtype in (torch.bfloat16, torch.float32):
        for layer in layers(adapted(dtype=dtype)).values():
            x = torch.randn(2, 5, layer.in_features).to(dtype)
            gates = layer.update_of("default").gates(x)
            assert gates.shape == (2, 5, 3)
            assert gates.dtype == torch.float32
            assert (gates >= 0).all()
            torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5), rtol=1e-6, atol=0)


def test_one_expert_is_plain_lora():
    """N = 1: B' = diag(b) B, A' = diag(a) A; the router gets a gradient of exactly zero, and merging is exact."""
    model = adapted(num_experts=1)
    plain = peft.get_peft_model(
        build_base("Linear", torch.float64), RankConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(updates(model), updates(plain), strict=True):
            theirs.lora_A.copy_(ours.expert_A[0].unsqueeze(1) * ours.lora_A)
            theirs.lora_B.copy_(ours.expert_B[0].unsqueeze(1) * ours.lora_B)
    x = inputs(torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(model).items():
        assert gradient.any() != name.endswith("router"), name
    torch.testing.assert_close(model.merge_and_unload()(x), plain(x), rtol=1e-12, atol=1e-12)


def test_equal_scalings_are_plain_lora_for_any_router():
    model = adapted()
    plain = peft.get_peft_model(
        build_base("Linear", torch.float64), RankConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(updates(model), updates(plain), strict=True):
            ours.expert_A.fill_(1.0)
            ours.expert_B.fill_(1.0)
            theirs.lora_A.copy_(ours.lora_A)
            theirs.lora_B.copy_(ours.lora_B)
    x = inputs(torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(model).items():
        if name.endswith("router"):
            assert gradient.abs().max() < 1e-12
    assert gradients(plain)


@pytest.mark.parametrize("expert", range(3))
def test_a_one_hot_gate_is_that_expert(expert):
    for layer in layers(adapted()).values():
        update = layer.update_of("default")
        x = torch.rand(5, layer.in_features, dtype=torch.float64) + 0.5
        with torch.no_grad():
            update.router.zero_()
            update.router[expert] = 1e4
        alone = update.expert_B[expert].diag() @ update.lora_B @ update.expert_A[expert].diag() @ update.lora_A
        expected = layer.base_layer(x) + 2.0 * x @ alone.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_experts_does_not_matter():
    model = adapted()
    shuffled = copy.deepcopy(model)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for _, update in updates(shuffled):
            for parameter in (update.expert_A, update.expert_B, update.router):
                parameter.copy_(parameter[order])
    x = inputs(torch.float64)
    torch.testing.assert_close(shuffled(x), model(x), rtol=1e-12, atol=1e-12)
    expected = gradients(model)
    for name, gradient in gradients(shuffled).items():
        shared = name.rpartition(".")[2].startswith("lora_")
        torch.testing.assert_close(gradient, expected[name] if shared else expected[name][order], rtol=1e-9, atol=1e-9)


def test_a_uniform_mixture_is_one_static_lora():
    """Against the routed adapter with a router of zeros, and merged."""
    uniform, routed = adapted(router="uniform"), adapted()
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(updates(uniform), updates(routed), strict=True):
            assert ours.router is None
            for name in ("lora_A", "lora_B", "expert_A", "expert_B"):
                getattr(theirs, name).copy_(getattr(ours, name))
            theirs.router.zero_()
    x = inputs(torch.float64)
    torch.testing.assert_close(uniform(x), routed(x), rtol=1e-12, atol=1e-12)
    found, expected = gradients(uniform), gradients(routed)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)
    for layer in layers(uniform).values():
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) <= 4
    torch.testing.assert_close(uniform.merge_and_unload()(x), routed(x), rtol=1e-12, atol=1e-12)


def train(model, steps, lr=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        (model.train()(inputs(torch.float64, seed=step)) - 1.0).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return found


def test_only_B_learns_in_the_first_step_and_the_router_from_the_second():  # noqa: N802
    first, second = train(adapted(perturbed=False, r=4), 2)
    for name, gradient in first.items():
        assert gradient.any() == name.endswith("lora_B"), name
    for name, gradient in second.items():
        assert gradient.any(), name


def test_without_noise_the_router_waits_longer():
    """Scalings that start equal get equal gradients first: the noise is there for the router."""
    second = train(adapted(perturbed=False, expert_noise=0.0, router_std=0.02), 2)[1]
    assert all(gradient.abs().max() < 1e-15 for name, gradient in second.items() if name.endswith("router"))


def test_equal_experts_without_a_choice_stay_equal_forever():
    model = adapted(perturbed=False)
    with torch.no_grad():
        for _, update in updates(model):
            update.expert_A.fill_(1.0)
            update.expert_B.fill_(1.0)
            update.router.zero_()
    train(model, 30)
    for _, update in updates(model):
        for name in ("expert_A", "expert_B", "router"):
            rows = getattr(update, name)
            torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-9, atol=1e-12)
            assert rows.abs().max() > 0 or name == "router"


def test_the_start_is_the_specified_one():
    torch.manual_seed(0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(600, 500)), MorConfig(target_modules=["0"]))
    (update,) = (update for _, update in updates(model))
    assert update.lora_A.shape == (8, 600)
    assert update.lora_B.shape == (500, 8)
    assert not update.lora_B.any()
    assert float(update.lora_A.detach().abs().max()) <= 600**-0.5
    for tensor, shape, mean in (
        (update.expert_A, (8, 8), 1.0),
        (update.expert_B, (8, 500), 1.0),
        (update.router, (8, 600), 0.0),
    ):
        assert tensor.shape == shape
        assert tensor.mean().item() == pytest.approx(mean, abs=0.01)
        assert tensor.std().item() == pytest.approx(0.02, rel=0.25)
    assert layers(model)["0"].scaling["default"] == 2.0
    assert update.dropout == 0.05


def test_the_vera_start_is_the_identity_too():
    model = adapted(perturbed=False, expert_init="vera")
    torch.testing.assert_close(
        model(inputs(torch.float64)), build_base("Linear", torch.float64)(inputs(torch.float64)), rtol=0, atol=0
    )
    for _, update in updates(model):
        assert (update.expert_A == torch.tensor(0.1)).all()
        assert not update.expert_B.any()
        assert update.lora_B.any()
    first = train(model, 1)[0]
    for name, gradient in first.items():
        assert gradient.any() == name.endswith("expert_B"), name
    random = adapted(perturbed=False, expert_init="vera", init_weights=False)
    assert (
        random(inputs(torch.float64)) - build_base("Linear", torch.float64)(inputs(torch.float64))
    ).abs().max() > 0.01


def test_the_tensors_have_the_settled_names_and_shapes():
    state = peft.get_peft_model_state_dict(adapted())
    prefix = "base_model.model.wide.ranktune_update."
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
    assert shapes == {
        "lora_A": (4, 12),
        "lora_B": (20, 4),
        "expert_A": (3, 4),
        "expert_B": (3, 20),
        "router": (3, 12),
    }


def test_routers_and_scalings_stay_float32_when_cast():
    model = adapted(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.to(torch.bfloat16).named_parameters():
        kept = name.rpartition(".")[2] in ("expert_A", "expert_B", "router")
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        if kept:
            assert torch.equal(parameter, before[name])


LLAMA_FFN = 3 * 32  # modules


@pytest.mark.parametrize(("r", "millions", "share"), [(8, 23.21, 0.344), (32, 58.02, 0.861)])
def test_parameters_of_llama_2_7b(r, millions, share):
    """The specification's figures for gate, up and down projections, on a model without storage."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
        size = sum(parameter.numel() for parameter in base.parameters())
        model = peft.get_peft_model(
            base, MorConfig(r=r, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
        )
    found = ranktune.active_parameters(model)
    wide, narrow = 11008, 4096
    per_layer = 3 * (r * (narrow + wide) + 8 * r) + 8 * (2 * wide + narrow) + 8 * (2 * narrow + wide)
    assert found == 32 * per_layer
    assert len(list(updates(model))) == LLAMA_FFN
    assert found / 1e6 == pytest.approx(millions, abs=0.01)
    assert 100 * found / size == pytest.approx(share, abs=0.002)


def llama_2_7b_plan(**fields):
    config = MorConfig(target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM", **fields)
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    return plan(config, base)


def test_sizes_beside_lora_and_a_mixture_of_loras():
    """The specification's: LoRA r = 16 has as many as MoR r = 8, N = 8; a mixture of two LoRAs of r = 8 95 % of it."""
    found = llama_2_7b_plan(r=8, num_experts=2)
    assert found.compared["MoE-LoRA with 2 experts"] / 1e6 == pytest.approx(24.4, abs=0.05)
    eight = llama_2_7b_plan(r=8)
    assert 2 * eight.compared["LoRA"] / 1e6 == pytest.approx(23.20, abs=0.01)
    assert eight.adapter / found.compared["MoE-LoRA with 2 experts"] == pytest.approx(0.950, abs=0.001)
    caption = plan_table(eight).caption
    assert "The adapter's 23,205,888 beside others of the same ranks: LoRA 11,599,872 (2 x), MoE-LoRA" in caption


def test_other_methods_compare_with_nothing():
    with torch.device("meta"):
        base = build_base("Linear")
    found = plan(RankConfig(target_modules=TARGETS), base)
    assert found.compared is None
    assert "beside others" not in plan_table(found).caption


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 2.0}, "num_experts=2.0"),
        ({"router": "top-k"}, "router='top-k' must be one of 'softmax', 'uniform', 'balanced'"),
        ({"expert_init": "zeros"}, "expert_init='zeros'"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1"),
        ({"balance_weight": float("nan")}, "balance_weight=nan"),
        ({"router_std": True}, "router_std=True"),
        ({"expert_noise": float("inf")}, "expert_noise=inf"),
        ({"use_dora": True}, "use_dora=True cannot be used with mor: .*for every token"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"r": "8"}, "r='8'"),
        ({"expert_noise": 0.0, "router_std": 0.0}, "stay equal forever"),
        ({"expert_noise": 0.0, "router": "uniform"}, "stay equal forever"),
        ({"expert_init": "vera", "router_std": 0.0}, "stay equal forever"),
        ({"expert_init": "vera", "router": "uniform"}, "stay equal forever"),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        MorConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "expert_noise": 0.0, "router_std": 0.0},
        {"expert_noise": 0.0},
        {"router_std": 0.0},
        {"expert_init": "vera"},
        {"router": "uniform", "router_std": 0.0},
    ],
)
def test_starts_that_can_break_the_symmetry_are_taken(fields):
    MorConfig(**fields)


def test_alpha_is_twice_the_rank_unless_said():
    assert MorConfig().lora_alpha == 16
    assert MorConfig(r=3).lora_alpha == 6
    assert MorConfig(r=3, lora_alpha=3).lora_alpha == 3
    assert {layer.scaling["default"] for layer in layers(adapted(use_rslora=True)).values()} == {4.0}


def test_a_saved_adapter_of_another_rank_loads():
    """On load the shapes in the file decide, for the experts' scalings too."""
    model, other = adapted(r=4), adapted(r=2)
    other.load_state_dict(model.state_dict())
    x = inputs(torch.float64)
    assert layers(other)["wide"].update_of("default").expert_A.shape == (3, 4)
    for layer, source in zip(layers(other).values(), layers(model).values(), strict=True):
        layer.scaling = source.scaling
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("router", ["softmax", "uniform", "balanced"])
def test_a_hooked_base_computes_the_same(router, dropout):
    """The composed formula stands in where the fused op may not."""
    results = []
    for hooked in (False, True):
        model = adapted(router=router, lora_dropout=dropout).train()
        if hooked:
            for layer in layers(model).values():
                layer.base_layer.register_forward_hook(lambda *_: None)
        torch.manual_seed(5)
        x = inputs(torch.float64).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-10, atol=1e-10)
