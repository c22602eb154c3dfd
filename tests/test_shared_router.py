"""`MorConfig(shared_router=True)`: one router for a block's modules, against the same formula written out."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import ranktune
from ranktune import ConfigError, MorConfig, mean_gate
from ranktune.adapters import updates
from ranktune.router_health import RouterHealth
from ranktune.run.targets import plan
from tests.methods import perturb

WIDTH, INNER, BLOCKS = 6, 10, 2
TARGETS = ["gate", "up", "down"]
FIELDS = {
    "r": 2,
    "lora_alpha": 6,
    "num_experts": 3,
    "lora_dropout": 0.0,
    "target_modules": TARGETS,
    "shared_router": True,
}


class Block(nn.Module):
    """A gated feed-forward part with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.down(torch.tanh(self.gate(x)) * self.up(x)))


class Stack(nn.Module):
    """Blocks, and a module outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.gate = nn.Linear(WIDTH, 4)
        self.checkpointing: bool | None = None

    def forward(self, x):
        for layer in self.layers:
            if self.checkpointing is None:
                x = layer(x)
            else:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.checkpointing)
        return self.gate(x)


def adapted(dtype=torch.float64, name="default", **fields):
    torch.manual_seed(0)
    base = Stack().to(dtype)
    model = peft.get_peft_model(base, MorConfig(**{**FIELDS, **fields}), adapter_name=name)
    return perturb(model, scale=0.5)


def batch(dtype=torch.float64, seed=1):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written_out(model, x):
    """The model's output from stock operators: each block's gates are those of its own input."""
    found = dict(updates(model))
    base = model.get_base_model()

    def linear(name, layer, x, gates):
        update, s = found[name], FIELDS["lora_alpha"] / FIELDS["r"]
        experts = torch.stack(
            [
                (x @ update.lora_A.T * a) @ update.lora_B.T * b
                for a, b in zip(update.expert_A, update.expert_B, strict=True)
            ]
        )
        return layer.base_layer(x) + s * torch.einsum("...n,n...o->...o", gates, experts)

    def gates_of(name, x):
        owner = found[name]
        return torch.softmax(x @ owner.router.T + (0 if owner.router_bias is None else owner.router_bias), -1)

    for number, block in enumerate(base.layers):
        stem = f"layers.{number}."
        gates = gates_of(f"{stem}gate", x)
        inner = torch.tanh(linear(f"{stem}gate", block.gate, x, gates)) * linear(f"{stem}up", block.up, x, gates)
        x = x + torch.tanh(linear(f"{stem}down", block.down, inner, gates))
    return linear("gate", base.gate, x, gates_of("gate", x))


def gradients(model, output, x):
    """Of the parameters by name, and of the input."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(output.square().sum(), [*parameters.values(), x])
    return dict(zip([*parameters, "x"], values, strict=True))


@pytest.mark.parametrize("way", ["fused", "plain"])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_the_formula(way, bias):
    model = adapted(router_bias=bias)
    if way == "plain":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda *_: None)
    x, y = batch().requires_grad_(), batch().requires_grad_()
    ours, expected = model(x), written_out(model, y)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    found, wanted = gradients(model, ours, x), gradients(model, expected, y)
    assert any(name.endswith("router_bias") for name in found) == bias
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = adapted()
    x, y = batch().requires_grad_(), batch().requires_grad_()
    expected = gradients(model, model(x), x)
    model.get_base_model().checkpointing = reentrant
    if reentrant:  # torch.autograd.grad does not go with it
        model(y).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"x": y.grad}
    else:
        found = gradients(model, model(y), y)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("router", ["softmax", "balanced"])
def test_training_follows_the_formula(router):
    """Several optimizer steps; a balanced router is pushed once for each block, by the gates of its own tokens."""
    ours, theirs = adapted(router=router), adapted()
    steps = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (ours, theirs)]
    for seed in range(3):
        x = batch(seed=seed)
        for model, optimizer, forward in ((ours, steps[0], ours), (theirs, steps[1], lambda x: written_out(theirs, x))):
            optimizer.zero_grad()
            loss = forward(x).square().mean()
            if router == "balanced" and model is theirs:
                loss = loss + 0.01 * sum(balance_losses(theirs, x))
            loss.backward()
            optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=name)


def balance_losses(model, x):
    """``N sum_i f_i P_i`` of each router on the inputs it gets, which are constants."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
        for name, module in model.named_modules()
        if name.endswith(".gate")
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    losses = []
    for name, update in updates(model):
        if update.router is not None:
            inputs = seen[f"base_model.model.{name}"].flatten(0, -2)
            gates = torch.softmax(inputs @ update.router.T, -1)
            share = torch.nn.functional.one_hot(gates.argmax(1), 3).double().mean(0)
            losses.append(3 * (share * gates.mean(0)).sum())
    assert len(losses) == BLOCKS + 1
    return losses


def test_one_router_a_block_is_what_is_saved_and_counted(tmp_path):
    """r (in + out) + N (r + out) for each module, N in for each router."""
    model = adapted(dtype=torch.float32)
    routers = [name for name in model.state_dict() if "router" in name]
    assert routers == [
        *(f"base_model.model.layers.{b}.gate.ranktune_update.default.router" for b in range(BLOCKS)),
        "base_model.model.gate.ranktune_update.default.router",
    ]
    modules = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)] * BLOCKS + [(WIDTH, 4)]
    expected = sum(2 * (i + o) + 3 * (2 + o) for i, o in modules) + 3 * WIDTH * (BLOCKS + 1)
    assert ranktune.active_parameters(model) == expected
    assert plan(MorConfig(**FIELDS), Stack()).adapter == expected
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = Stack()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, adapter_name="other").eval()
    x = batch(torch.float32)
    assert torch.equal(loaded(x), model.eval()(x))
    shown = ranktune.inspect(tmp_path).modules
    assert shown["layers.0.gate"].experts[0].router_norm > 0
    assert shown["layers.0.up"].experts[0].router_norm is None
    assert shown["layers.0.up"].norm is None  # there is no one update


def test_the_specifications_count_for_llama():
    """Llama-2-7B's feed-forward part: 19.3 million parameters with a router a block, 23.2 with one a layer."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32
    )
    targets = ["gate_proj", "up_proj", "down_proj"]
    for shared, millions in ((True, 19.34), (False, 23.21)):
        with torch.device("meta"):
            skeleton = LlamaForCausalLM(config)
        found = plan(MorConfig(target_modules=targets, shared_router=shared), skeleton)
        assert round(found.adapter * 16 / 1e6, 2) == millions


def test_several_adapters_each_with_their_own_routers():
    model = adapted()
    torch.manual_seed(5)
    model.add_adapter("other", MorConfig(**{**FIELDS, "num_experts": 4}))
    perturb(model, seed=9)
    x = batch()
    with torch.no_grad():
        first = model(x)
        torch.testing.assert_close(first, written_out(model, x), rtol=1e-11, atol=1e-11)
        model.set_adapter("other")
        second = model(x)
        torch.testing.assert_close(second, written_out(model, x), rtol=1e-11, atol=1e-11)
        model.base_model.set_adapter(["default", "other"])
        both = model(x)
        model.set_adapter("default")
        assert torch.equal(model(x), first)
        with model.disable_adapter():
            without = model(x)
    assert len({float(y.sum()) for y in (first, second, both, without)}) == 4
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(x), second)


def test_training_goes_on_from_a_file_bit_for_bit(tmp_path):
    def trained(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            model(batch(torch.float32, seed)).square().mean().backward()
            optimizer.step()
        return model

    def optimizer_of(model):
        return torch.optim.AdamW(ranktune.parameter_groups(model, lr=0.01, weight_decay=0.1), lr=0.01)

    whole = adapted(dtype=torch.float32, lora_dropout=0.0).train()
    first = optimizer_of(whole)
    trained(whole, first, range(3))
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(first.state_dict())
    trained(whole, first, range(3, 6))
    torch.manual_seed(0)
    resumed = peft.PeftModel.from_pretrained(Stack(), tmp_path, is_trainable=True).train()
    second = optimizer_of(resumed)
    second.load_state_dict(state)
    trained(resumed, second, range(3, 6))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_pass_that_failed_leaves_nothing_behind():
    model = adapted()
    x, expected = batch(), model(batch())
    handle = model.get_base_model().layers[1].down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch(seed=4))
    handle.remove()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_shares_within_itself_and_with_nothing_else(way):
    model = adapted()
    x, expected = batch(), model(batch()).detach()
    up = dict(updates(model))["layers.0.up"]
    up.block.take(up, batch())  # in the middle of a pass
    twin = way(model)
    with torch.no_grad():
        for _, update in updates(twin):
            if update.router is not None:
                update.router.mul_(-3.0)
    torch.testing.assert_close(twin(x), written_out(twin, x), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(twin(x), expected)
    torch.testing.assert_close(model(x).detach(), expected)
    blocks = {id(update.block) for _, update in updates(twin) if update.block is not None}
    assert len(blocks) == BLOCKS
    assert not blocks & {id(update.block) for _, update in updates(model)}


def test_under_autocast_and_in_bfloat16_gates_are_float32():
    model = adapted(dtype=torch.bfloat16)
    update = dict(updates(model))["layers.0.up"]
    assert update.gates(batch(torch.bfloat16)).dtype == torch.float32
    owner = dict(updates(model))["layers.0.gate"]
    assert owner.router.dtype == torch.float32
    model(batch(torch.bfloat16)).float().sum().backward()
    assert owner.router.grad.abs().max() > 0
    wide = adapted(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wide(batch(torch.float32))
    exact = wide(batch(torch.float32))
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


def test_compiled_is_the_same():
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    x, y = batch().requires_grad_(), batch().requires_grad_()
    expected, ours = model(x), compiled(y)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    wanted, found = gradients(model, expected, x), gradients(model, ours, y)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
    torch.testing.assert_close(compiled(y), expected, rtol=1e-11, atol=1e-11)


def test_routers_are_watched_once_and_averaged_for_every_module():
    model = adapted().train()
    health = RouterHealth(model)
    model(batch())
    health.read(1)
    assert list(health.latest) == [f"layers.{b}.gate" for b in range(BLOCKS)] + ["gate"]
    health.close()
    report = mean_gate(model, [batch(), batch(seed=2)])
    assert report.gates["layers.0.up"] == report.gates["layers.0.gate"] != report.gates["layers.1.up"]
    assert 0.0 < report.output_error < 1.0
    for name in report.module_errors:
        assert 0.0 < report.module_errors[name] < 1.0
    with pytest.raises(ConfigError, match="cannot be merged"):
        model.merge_and_unload()


def bart(**fields):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        dropout=0.0,
        attention_dropout=0.0,
    )
    return peft.get_peft_model(
        BartForConditionalGeneration(config), MorConfig(**{**FIELDS, "target_modules": "all-linear", **fields})
    )


def test_cross_attention_sees_other_tokens_and_is_refused():
    """The first module that runs need not be the first that is listed: BART lists its keys before its queries."""
    ids = {"input_ids": torch.arange(10).view(2, 5), "decoder_input_ids": torch.arange(6).view(2, 3)}
    with pytest.raises(ConfigError, match=r"gates were made for 6 tokens.*was called with 10.*exclude_modules"):
        bart()(**ids)
    model = bart(exclude_modules=r".*encoder_attn\.[kv]_proj")
    model(**ids).logits.sum().backward()
    assert sum(update.router is not None for _, update in updates(model)) == 2


def test_a_module_alone_in_its_block_has_its_own_router():
    model = adapted(target_modules=["down"])
    assert [update.block for _, update in updates(model)] == [None] * BLOCKS
    assert [tuple(update.router.shape) for _, update in updates(model)] == [(3, INNER)] * BLOCKS


def test_a_router_of_another_width_is_refused():
    model = adapted(target_modules=["up", "down"])
    first = model.get_base_model().layers[0]
    with pytest.raises(ConfigError, match=r"reads inputs of width 6.*width 10 was called first"):
        first.down(torch.zeros(1, INNER, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_router": 1}, "shared_router=1 must be true or false"),
        ({"router_bias": "yes"}, "router_bias='yes' must be true or false"),
        ({"router": "uniform"}, "shared_router=True has no effect with router='uniform'"),
        ({"router": "uniform", "shared_router": False, "router_bias": True}, "router_bias=True has no effect"),
        ({"router": "balanced", "router_bias": True}, "router_bias=True cannot be used with router='balanced'"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MorConfig(**{**FIELDS, **fields})
