"""The load-balancing loss that takes effect by itself, against the same loss added by hand."""

from __future__ import annotations

import copy
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from ranktune import MorConfig
from ranktune.adapters import updates
from ranktune.layer import RankLayer
from ranktune.mixture import route
from tests.methods import TARGETS, build_base, inputs, perturb

WEIGHT = 0.3  # far more than the default, so that it shows beside the loss


def twins(**fields):
    """A balanced adapter, and a softmax one with the same weights."""
    found = []
    for router in ("balanced", "softmax"):
        options = {"r": 2, "num_experts": 3, "router_std": 0.5, "lora_dropout": 0.0, **fields}
        config = MorConfig(router=router, balance_weight=WEIGHT, target_modules=TARGETS, **options)
        found.append(perturb(peft.get_peft_model(build_base("Linear"), config)).train())
    return found


def layers(model):
    return [module for module in model.modules() if isinstance(module, RankLayer)]


class ByHand:
    """Sums ``N sum_i f_i P_i`` over a softmax adapter's layers. The layers below do not see it: x is detached."""

    def __init__(self, model):
        self.total = 0.0
        for layer in layers(model):
            layer.register_forward_pre_hook(self.note)

    def note(self, layer, args):
        gates = route(args[0].detach(), layer.update_of("default").router).flatten(0, -2)
        chosen = nn.functional.one_hot(gates.argmax(1), 3).double().mean(0)
        self.total = self.total + 3 * (chosen * gates.mean(0)).sum()

    def take(self):
        total, self.total = self.total, 0.0
        return WEIGHT * total


def optimizer_for(model, kind="sgd"):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=0.1)
    return torch.optim.AdamW(trained, lr=0.01, fused=kind == "fused")


def assert_same_adapter(first, second, **tolerance):
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("path", ["fused", "plain", "reentrant", "non-reentrant", "compiled"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_step_is_that_of_the_loss_added_by_hand(path, micro_batches):
    ours, theirs = twins()
    by_hand = ByHand(theirs)
    run = ours
    if path == "plain":
        for layer in layers(ours):
            layer.base_layer.register_forward_hook(lambda *_: None)
    elif path == "compiled":
        torch._dynamo.reset()
        run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    elif path != "fused":
        run = partial(checkpoint, ours, use_reentrant=path == "reentrant")
    steppers = optimizer_for(ours), optimizer_for(theirs)
    for step in range(2):
        for part in range(micro_batches):
            x = inputs(seed=10 * step + part).requires_grad_()
            (run(x).square().mean() / micro_batches).backward()
            main = theirs(x).square().mean()
            ((main + by_hand.take()) / micro_batches).backward()
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_adapter(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_does_not_multiply_it(kind, unscale):
    ours, theirs = twins()
    by_hand = ByHand(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    mine, other = optimizer_for(ours, kind), optimizer_for(theirs, kind)
    for step in range(3):
        x = inputs(seed=step)
        scaler.scale(ours(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(mine)
        scaler.step(mine)
        scaler.update()
        (theirs(x).square().mean() + by_hand.take()).backward()
        other.step()
        mine.zero_grad()
        other.zero_grad()
    assert_same_adapter(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_a_step_that_a_scaler_skips_leaves_nothing_bad_behind(kind):
    model, _ = twins()
    optimizer = optimizer_for(model, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = copy.deepcopy(model.state_dict())
    bad = inputs()
    bad[0, 0, 0] = float("inf")
    scaler.scale(model(bad).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    optimizer.zero_grad()
    scaler.scale(model(inputs()).square().mean()).backward()
    scaler.step(optimizer)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class WithLoss(nn.Module):
    """What Trainer wants of a model: a loss, here with its own share of the balance where it is given one."""

    def __init__(self, model, by_hand=None):
        super().__init__()
        self.model, self.by_hand = model, by_hand

    def forward(self, x, labels):
        loss = (self.model(x) - labels).square().mean()
        return {"loss": loss if self.by_hand is None else loss + self.by_hand.take()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_needs_nothing_added(tmp_path, accumulation):
    ours, theirs = twins()
    data = [{"x": inputs(seed=i)[0], "labels": torch.ones(5, 3)} for i in range(8)]
    for model in (WithLoss(ours), WithLoss(theirs, ByHand(theirs))):
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=0.05,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
    start = twins()[0]
    assert not torch.equal(layers(ours)[0].update_of("default").router, layers(start)[0].update_of("default").router)
    assert_same_adapter(ours, theirs, **CLOSE)


def test_evaluation_gathers_nothing():
    model, plain = twins()
    optimizers = optimizer_for(model), optimizer_for(plain)
    for network, optimizer in zip((model, plain), optimizers, strict=True):
        network.eval()(inputs()).square().mean().backward()
        with torch.no_grad():
            network.train()(inputs())
        optimizer.step()
    assert_same_adapter(model, plain, rtol=0, atol=0)


def test_only_the_optimizer_that_holds_the_router_takes_it():
    ours, theirs = twins()
    by_hand = ByHand(theirs)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    ours(inputs()).square().mean().backward()
    other.step()
    optimizer_for(ours).step()
    (theirs(inputs()).square().mean() + by_hand.take()).backward()
    optimizer_for(theirs).step()
    assert_same_adapter(ours, theirs, **CLOSE)


def test_a_router_without_a_gradient_keeps_none():
    """A controller drops a step by taking every gradient away; the term must not bring one back, nor keep itself."""
    model, plain = twins()
    optimizer = optimizer_for(model)
    model(inputs()).square().mean().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert_same_adapter(model, plain, rtol=0, atol=0)
    by_hand = ByHand(plain)
    model(inputs(seed=4)).square().mean().backward()
    optimizer.step()
    (plain(inputs(seed=4)).square().mean() + by_hand.take()).backward()
    optimizer_for(plain).step()
    assert_same_adapter(model, plain, **CLOSE)


def test_a_copy_balances_itself():
    """A deep copy gathers apart from what it was copied from, in the middle of a step too."""
    model, theirs = twins()
    model(inputs()).square().mean().backward()
    clone, also_theirs = copy.deepcopy(model), copy.deepcopy(theirs)
    clone.zero_grad()
    clone(inputs(seed=7)).square().mean().backward()
    optimizer_for(clone).step()
    optimizer_for(model).step()
    for network, expected, seed in ((clone, theirs, 7), (model, also_theirs, 1)):
        by_hand = ByHand(expected)
        (expected(inputs(seed=seed)).square().mean() + by_hand.take()).backward()
        optimizer_for(expected).step()
        assert_same_adapter(network, expected, **CLOSE)


def test_a_router_that_is_replaced_is_balanced():
    """Loading with ``assign`` puts new parameters in the place of those that were there when training mode was set."""
    ours, theirs = twins()
    ours.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()}, assign=True)
    ours(inputs()).square().mean().backward()
    optimizer_for(ours).step()
    by_hand = ByHand(theirs)
    (theirs(inputs()).square().mean() + by_hand.take()).backward()
    optimizer_for(theirs).step()
    assert_same_adapter(ours, theirs, **CLOSE)


def test_it_evens_out_the_load():
    """Trained by nothing else, a router that sends most tokens to one expert learns to spread them."""
    torch.manual_seed(0)
    config = MorConfig(r=2, num_experts=3, router="balanced", balance_weight=1.0, target_modules=["square"])
    model = peft.get_peft_model(build_base("Linear"), config).train()
    update = layers(model)[0].update_of("default")
    with torch.no_grad():
        update.router[0] += 0.3
    x = inputs().abs()

    def largest() -> float:
        return float(update.gates(x).detach().flatten(0, -2).mean(0).max())

    before = largest()
    optimizer = torch.optim.SGD([update.router], lr=0.5)
    for _ in range(100):
        (0.0 * model(x).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 0.55
    assert largest() < 0.45


def test_uniform_and_plain_routers_gather_nothing():
    for fields in ({"router": "softmax"}, {"router": "uniform"}, {"router": "balanced", "balance_weight": 0.0}):
        model = peft.get_peft_model(build_base("Linear"), MorConfig(target_modules=TARGETS, **fields)).train()
        model(inputs()).sum().backward()
        assert all(update.balance_leaves() is None for _, update in updates(model))
