"""How experts are used: counted right, logged, drawn, and a collapse said once."""

from __future__ import annotations

import json
import logging
import math

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ranktune import MorConfig, RankConfig
from ranktune.adapters import updates
from ranktune.gate_usage import ExpertUse, GateUsage
from ranktune.report.plots import draw_run
from ranktune.router_health import RouterHealth, has_collapsed
from ranktune.run.directory import RunDirectory
from tests.methods import TARGETS, build_base, inputs, perturb
from tests.test_trainer_callback import build_trainer, callback_of, state_of
from tests.tiny import write_everything, write_recipe


def adapted(**fields):
    config = MorConfig(**{"r": 2, "num_experts": 3, "lora_dropout": 0.0, "target_modules": TARGETS, **fields})
    return perturb(peft.get_peft_model(build_base("Linear"), config)).train()


def test_load_choices_and_entropy_are_those_of_the_gates():
    gates = torch.softmax(3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), 1)
    usage = GateUsage(training=True)
    assert usage.take() is None
    for part in gates.split(13):
        usage.add(part)
    load = usage.load()
    use = usage.take()
    torch.testing.assert_close(torch.tensor(use.load), gates.mean(0))
    torch.testing.assert_close(load, gates.mean(0))
    torch.testing.assert_close(torch.tensor(use.chosen), (gates.argmax(1)[:, None] == torch.arange(5)).float().mean(0))
    entropy = -(gates * gates.log()).sum(1).mean() / math.log(5)
    assert use.entropy == pytest.approx(float(entropy), rel=1e-5)
    assert use.tokens == 40
    assert usage.take() is None
    assert usage.load() is None


def test_gates_of_zero_and_one_have_no_entropy():
    usage = GateUsage(training=True)
    usage.add(torch.eye(4)[:2])
    use = usage.take()
    assert use.entropy == 0.0
    assert use.load == [0.5, 0.5, 0.0, 0.0]
    assert use.effective_experts == pytest.approx(2.0)


@pytest.mark.parametrize("path", ["fused", "plain", "checkpointed"])
def test_what_is_read_is_what_the_routers_did(path):
    model = adapted()
    if path == "plain":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_: None)
    health = RouterHealth(model)
    _, first = next(updates(model))
    expected = torch.cat([first.gates(inputs(seed=seed)) for seed in (1, 2)]).detach().flatten(0, -2).mean(0)
    for seed in (1, 2):
        if path == "checkpointed":
            checkpoint(model, inputs(seed=seed), use_reentrant=False).sum().backward()
        else:
            model(inputs(seed=seed)).sum().backward()
    with torch.no_grad():
        model.eval()(100 * inputs(seed=3))  # an evaluation in between does not count
    summary = health.read(step=2)
    assert list(health.latest) == TARGETS
    torch.testing.assert_close(torch.tensor(health.latest["square"].load), expected, rtol=1e-5, atol=1e-6)
    assert health.latest["square"].tokens == (40 if path == "checkpointed" else 20)
    entropies = [use.entropy for use in health.latest.values()]
    assert summary == {
        "router_entropy": pytest.approx(sum(entropies) / 3),
        "router_top_load": pytest.approx(max(max(use.load) for use in health.latest.values())),
    }
    assert health.read(step=3) == {}
    health.close()
    assert all(update.usage is None for _, update in updates(model))


@pytest.mark.parametrize("config", [MorConfig(router="uniform"), MorConfig(num_experts=1), RankConfig()])
def test_without_routers_there_is_nothing_to_watch(config):
    config.target_modules = set(TARGETS)
    model = peft.get_peft_model(build_base("Linear"), config).train()
    health = RouterHealth(model)
    model(inputs())
    assert health.read(step=1) == {}
    health.close()


@pytest.mark.parametrize(
    ("load", "collapsed"),
    [
        ([1.0, 0.0], True),
        ([0.9, 0.1], True),
        ([0.8, 0.2], False),
        ([0.5, 0.5], False),
        ([0.5, 0.5] + [0.0] * 8, True),
        ([0.4, 0.4, 0.2] + [0.0] * 7, False),
        ([0.1] * 10, False),
    ],
)
def test_what_counts_as_a_collapse(load, collapsed):
    assert has_collapsed(ExpertUse(load, load, 0.5, 10)) == collapsed


def test_a_collapse_is_said_once_with_the_worst_module(caplog):
    model = adapted()
    health = RouterHealth(model)
    with torch.no_grad():
        for name, update in updates(model):
            update.router.zero_()
            if name != "narrow":
                update.router[1] = 50.0 if name == "square" else 5.0
    positive = inputs().abs()
    with caplog.at_level(logging.WARNING, logger="ranktune"):
        for step in (1, 2):
            # each layer gets a positive input of its own
            for _, update in updates(model):
                update.usage.add(update.gates(positive[..., :1].expand(2, 5, update.router.shape[1])).flatten(0, 1))
            health.read(step)
    (record,) = caplog.records
    assert "step 1: the router of square has collapsed: one of its 3 experts has 100% of the load" in record.message
    assert "so have 2 of 3 routers" in record.message


def test_a_run_logs_and_draws_how_its_experts_are_used(tmp_path):
    from ranktune.recipe import load_recipe
    from ranktune.run.display import SilentDisplay
    from ranktune.training import train

    write_everything(tmp_path)
    file = write_recipe(tmp_path, method={"name": "mor", "r": 2, "num_experts": 3, "lora_alpha": None})
    train(load_recipe(file, []), file, SilentDisplay())
    directory = RunDirectory(tmp_path / "out")
    events = [event for event in directory.read_events() if event["event"] == "routers"]
    steps = [event["step"] for event in directory.read_events() if event["event"] == "step"]
    assert [event["step"] for event in events] == steps
    assert len(events[-1]["modules"]) == len(json.loads(directory.ranks.read_text())["final"])
    for use in events[-1]["modules"].values():
        assert sum(use["load"]) == pytest.approx(1.0, abs=1e-5)
        assert 0.0 <= use["entropy"] <= 1.00001
    for picture in directory.router_pictures:
        assert picture.exists()
        assert picture in directory.contents()
        picture.unlink()
    assert set(directory.router_pictures) <= set(draw_run(directory))
    assert all(picture.exists() for picture in directory.router_pictures)


def trainer_for(folder, router, **arguments):
    fields = {"r": 2, "num_experts": 3, "router": router, "target_modules": TARGETS, "balance_weight": 0.5}
    return build_trainer(folder, config=MorConfig(**fields), **arguments)


@pytest.mark.parametrize("router", ["softmax", "balanced"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, router):
    """Nothing that training depends on is outside the checkpoint; accumulation does not straddle a step."""
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    whole = trainer_for(tmp_path, router, **settings)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", router, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected, found = state_of(whole.model), state_of(resumed.model)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_trainer_logs_how_the_routers_do(tmp_path):
    trainer = trainer_for(tmp_path, "softmax", max_steps=8)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert 0.0 < entry["router_entropy"] <= 1.00001
        assert 1 / 3 - 1e-5 <= entry["router_top_load"] < 1.0
    assert callback_of(trainer).controller is None
    assert all(update.usage is None for _, update in updates(trainer.model))


def test_a_trainer_says_nothing_about_routers_there_are_none_of(tmp_path):
    trainer = build_trainer(tmp_path, config=RankConfig(r=2, target_modules=TARGETS), max_steps=4)
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("router")]
