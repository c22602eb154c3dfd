"""DyLoRA against its specification: what is drawn when, what a step moves, resuming, and the order that is learnt."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter

import peft
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

import ranktune
from ranktune import ConfigError, DyLoraConfig, RankConfig, RankController
from ranktune.adapters import updates
from ranktune.lowrank import Span
from ranktune.methods.dylora import DyLoraPolicy
from ranktune.policy import Layout
from ranktune.rank_setting import at_rank
from tests.methods import TARGETS, build_base, inputs, perturb

STEPS = 40


def build(perturbed=True, config_class=DyLoraConfig, **fields):
    torch.manual_seed(0)
    config = config_class(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    model = peft.get_peft_model(build_base("Linear"), config)
    return perturb(model) if perturbed else model


def optimizer_of(model, kind=torch.optim.AdamW, lr=0.02, **options):
    return kind(ranktune.parameter_groups(model, lr=lr, weight_decay=0.1), lr=lr, **options)


def step(model, optimizer, number, micro_batches=1):
    optimizer.zero_grad()
    for part in range(micro_batches):
        (model(inputs(seed=100 * number + part)) - 1.0).square().mean().backward()
    optimizer.step()


def train(model, optimizer, steps, start=0):
    for number in range(start, start + steps):
        step(model, optimizer, number)


def policy_of(**fields):
    return DyLoraPolicy(DyLoraConfig(**{"r": 8, **fields}), Layout(("m",), torch.tensor([1])))


def spans(model):
    return [update.draw.span for _, update in updates(model)]


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def components(name, tensor):
    return tensor if "lora_A" in name else tensor.T


# --- p_B


@pytest.mark.parametrize(
    ("fields", "ranks", "weights"),
    [
        ({}, range(1, 9), [1] * 8),
        ({"min_r": 3}, range(3, 9), [1] * 6),
        ({"block_size": 2}, (2, 4, 6, 8), [1] * 4),
        ({"block_size": 2, "min_r": 3}, (4, 6, 8), [1] * 3),
        ({"ranks": [1, 2, 4, 8]}, (1, 2, 4, 8), [1] * 4),
        ({"rank_distribution": "geometric"}, range(1, 9), [0.85**k for k in range(8)]),
        ({"rank_distribution": "geometric", "geometric_p": 0.5, "ranks": [2, 8]}, (2, 8), [2, 1]),
        ({"rank_distribution": [3.0, 1.0, 1.0, 5.0], "ranks": [1, 2, 4, 8]}, (1, 2, 4, 8), [3, 1, 1, 5]),
    ],
    ids=str,
)
def test_ranks_are_drawn_as_often_as_the_distribution_says(fields, ranks, weights):
    draws = Counter(policy_of(**fields).draw(7, number) for number in range(4000))
    assert set(draws) == set(ranks)
    observed = [draws[b] for b in ranks]
    assert chisquare(observed, [4000 * weight / sum(weights) for weight in weights]).pvalue > 1e-3


def test_what_is_drawn_depends_on_seed_and_step_alone():
    policy = policy_of()
    sequence = [policy.draw(3, number) for number in range(200)]
    torch.manual_seed(99)
    assert [policy_of(update="all").draw(3, number) for number in range(200)] == sequence
    assert [policy.draw(4, number) for number in range(200)] != sequence
    # Neighbouring steps and seeds do not follow one another.
    pairs = Counter(itertools.pairwise(sequence))
    assert max(pairs.values()) < 15
    assert sequence[1:] != [policy.draw(4, number) for number in range(199)]


def test_the_sequence_is_the_same_on_every_machine_and_version():
    """A run that is resumed elsewhere goes on as it began; these numbers must never change."""
    assert [policy_of().draw(0, number) for number in range(12)] == [4, 3, 3, 5, 5, 1, 5, 5, 4, 6, 5, 8]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {1: (0, 1), 2: (1, 2), 8: (7, 8)}),
        ({"update": "all"}, {1: (0, 1), 2: (0, 2), 8: (0, 8)}),
        ({"ranks": [1, 2, 4, 8]}, {1: (0, 1), 2: (1, 2), 4: (2, 4), 8: (4, 8)}),
        ({"min_r": 5}, {5: (0, 5), 6: (5, 6)}),
        ({"block_size": 4}, {4: (0, 4), 8: (4, 8)}),
        ({"ranks": [2, 8], "block_size": 2}, {2: (0, 2), 8: (2, 8)}),
    ],
    ids=str,
)
def test_a_step_trains_what_its_rank_has_more_than_the_next_lower_one(fields, expected):
    policy = policy_of(**fields)
    assert {b: tuple(policy.span(b, 8)) for b in expected} == expected
    if fields.get("update") != "all":
        # Together, the ranks train every component exactly once.
        trained = [i for b in policy.ranks for i in range(*policy.span(b, 8))]
        assert trained == list(range(8))


def test_a_run_that_is_short_for_frozen_components_is_told():
    """From the rarest rank's share of the steps; with update 'all' a step trains more than one component."""
    assert DyLoraConfig(r=8).advice(4000) is None
    assert "in about 69 of the 550 steps" in (DyLoraConfig(r=8).advice(550) or "")
    assert "about 500 of" in (DyLoraConfig(r=2, rank_distribution=[3, 1]).advice(1999) or "")
    assert DyLoraConfig(r=2, rank_distribution=[3, 1]).advice(2000) is None
    assert "about 250 of the 1,000 steps" in (DyLoraConfig(r=8, ranks=[1, 2, 4, 8]).advice(1000) or "")
    assert DyLoraConfig(r=8, update="all").advice(10) is None
    # What it says to set can be set.
    assert "(method.ranks=[1, 2, 4])" in (DyLoraConfig(r=4).advice(10) or "")
    assert "(method.ranks=[4, 8, 12])" in (DyLoraConfig(r=12, min_r=3, block_size=2).advice(10) or "")
    assert "method.ranks" not in (DyLoraConfig(r=4, ranks=[1, 2, 4]).advice(10) or "")
    assert DyLoraConfig(r=12, min_r=3, block_size=2, ranks=[4, 8, 12]).nested_ranks == [4, 8, 12]
    assert RankConfig().advice(1) is None


@pytest.mark.parametrize("fields", [{"block_size": 2}, {"ranks": [2, 4]}, {"block_size": 2, "update": "all"}], ids=str)
def test_a_step_in_blocks(fields):
    """The scale is alpha / b with b the number of components; only the last block has gradients, and W has none."""
    model = build(**fields).train()
    base = build_base("Linear")
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    lora = build(config_class=RankConfig)
    counts = [sum(p.numel() for g in optimizer_of(m).param_groups for p in g["params"]) for m in (model, lora)]
    assert counts[0] == counts[1]
    seen = set()
    for number in range(6):
        b = next(update.draw.span.end for _, update in updates(model))
        seen.add(b)
        expected = copy.deepcopy(base)
        with torch.no_grad():
            for name, update in updates(model):
                getattr(expected, name).weight += 6 / b * update.lora_B[:, :b] @ update.lora_A[:b]
        x = inputs(seed=number)
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-4)
        step(model, optimizer, number)
        first = 0 if fields.get("update") == "all" else b - 2
        for _, update in updates(model):
            assert update.lora_A.grad.any(1).tolist() == [first <= k < b for k in range(4)]
            assert update.lora_B.grad.any(0).tolist() == [first <= k < b for k in range(4)]
    assert seen == {2, 4}
    assert not [name for name, p in model.named_parameters() if "ranktune_" not in name and p.grad is not None]
    controller.close()


def test_a_module_of_a_lower_rank_trains_its_own_highest():
    policy = policy_of(ranks=[1, 2, 4, 8])
    assert [tuple(policy.span(b, 3)) for b in (1, 2, 4, 8)] == [(0, 1), (1, 2), (2, 3), (2, 3)]
    model = build(rank_pattern={"wide": 2}, r=4)
    RankController(model, optimizer_of(model), STEPS, seed=5)
    capacity = {name: update.capacity for name, update in updates(model)}
    assert capacity == {"square": 4, "wide": 2, "narrow": 4}
    for _, update in updates(model):
        update.draw.spans = lambda _, update=update: Span(3, 4) if update.capacity == 4 else Span(1, 2)
        update.draw.at(0)
    scales = [update.components_now(6 / update.capacity).scale for _, update in updates(model.train())]
    assert scales == pytest.approx([6 / 4, 6 / 2, 6 / 4])


# --- one b per optimizer step


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_all_modules_and_micro_batches_of_a_step_share_one_rank(micro_batches):
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS, seed=11)
    seen = []
    for number in range(STEPS):
        optimizer.zero_grad()
        used = set()
        for part in range(micro_batches):
            loss = (model(inputs(seed=100 * number + part)) - 1.0).square().mean()
            used.update(spans(model))
            loss.backward()
            used.update(spans(model))
        assert len(used) == 1
        b = used.pop().end
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                rows = components(name, parameter.grad)
                assert [bool(row.any()) for row in rows] == [i == b - 1 for i in range(4)], name
        optimizer.step()
        seen.append(b)
    assert seen == [controller.policy.draw(11, number) for number in range(STEPS)]
    assert len(set(seen)) == 4


def test_drawing_reads_and_advances_no_generator():
    model = build()
    optimizer = optimizer_of(model)
    state = torch.get_rng_state()
    RankController(model, optimizer, STEPS)
    train(model, optimizer, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_that_is_skipped_is_drawn_again():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS, seed=1)
    train(model, optimizer, 3)
    before = spans(model)
    (model(inputs(seed=9)) * float("nan")).sum().backward()
    optimizer.step()
    assert controller.skipped == 1
    assert controller.step == 3
    assert spans(model) == before


def test_evaluation_between_steps_changes_nothing():
    """At whatever rank: neither the draws, nor the random numbers, nor the rank that was in use."""
    digests = []
    for evaluate in (False, True):
        model = build(lora_dropout=0.2)
        optimizer = optimizer_of(model)
        RankController(model, optimizer, STEPS)
        torch.manual_seed(4)
        for number in range(10):
            if evaluate:
                model.eval()
                first = model(inputs())
                for b in (1, 3):
                    with at_rank(model, b), torch.no_grad():
                        assert torch.equal(model(inputs()), model(inputs()))
                        assert ranktune.total_rank(model) == 3 * b
                assert torch.equal(model(inputs()), first)
                model.train()
            step(model, optimizer, number)
        digests.append(factors(model))
    assert ranktune.total_rank(model) == 12
    for name, value in digests[0].items():
        assert torch.equal(value, digests[1][name])


def test_at_rank_restores_after_an_error():
    model = build()
    ranktune.set_rank(model, 3)
    with pytest.raises(RuntimeError), at_rank(model, 1):
        raise RuntimeError
    assert ranktune.total_rank(model) == 9


# --- without a controller, and after it


def test_without_a_controller_it_warns_and_trains_the_full_rank():
    model = build()
    with pytest.warns(UserWarning, match="without a controller"):
        model(inputs()).sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert components(name, parameter.grad).any(1).all()


def test_a_finished_controller_leaves_the_full_rank():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 3)
    controller.finish()
    assert all(update.draw is None for _, update in updates(model))
    model.train()
    with pytest.warns(UserWarning, match="without a controller"):
        y = model(inputs())
    assert torch.equal(y, model.eval()(inputs()))
    assert controller.history == []
    assert controller.ranks() == dict.fromkeys(TARGETS, 4)
    assert controller.importance() == {}


def test_a_copy_of_the_model_does_not_take_the_optimizer_along():
    model = build()
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)
    clone = copy.deepcopy(model)
    before = spans(clone)
    while spans(model) == before:
        train(model, optimizer, 1)
    assert spans(clone) == before
    assert torch.equal(clone.eval()(inputs()), build().eval()(inputs()))


# --- trajectories


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "min_r": 4, "update": "all"},
        {"r": 4, "min_r": 4, "update": "frozen"},
        {"r": 4, "ranks": [4], "optimizer_semantics": "strict"},
        {"r": 1},
        {"r": 1, "update": "all"},
        {"r": 4, "min_r": 4, "use_dora": True},
    ],
    ids=str,
)
def test_with_one_rank_training_is_that_of_plain_lora(fields):
    """Bit for bit, with dropout and weight decay."""
    results = []
    for config_class in (DyLoraConfig, RankConfig):
        own = fields if config_class is DyLoraConfig else {name: fields[name] for name in fields if name in LORA_WORDS}
        model = build(False, config_class, lora_dropout=0.1, **own)
        optimizer = optimizer_of(model)
        if config_class is DyLoraConfig:
            RankController(model, optimizer, STEPS)
        torch.manual_seed(2)
        train(model, optimizer, STEPS)
        results.append(factors(model))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert value.any()


LORA_WORDS = {"r", "use_dora"}


def test_with_one_rank_training_is_that_of_stock_peft():
    ours, stock = (
        build(False, config_class, **own) for config_class, own in
        ((DyLoraConfig, {"min_r": 4, "update": "all"}), (peft.LoraConfig, {}))
    )  # fmt: skip
    RankController(ours, adam := optimizer_of(ours), STEPS)
    with torch.no_grad():
        for name, update in updates(ours):
            layer = stock.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(update.lora_A)
    train(ours, adam, STEPS)
    train(stock, optimizer_of(stock), STEPS)
    torch.testing.assert_close(ours.eval()(inputs()), stock.eval()(inputs()), rtol=1e-3, atol=1e-4)


SEED = 5


@pytest.mark.parametrize("attach", ["before loading", "after loading"])
@pytest.mark.parametrize(
    "fields", [{}, {"optimizer_semantics": "strict", "update": "all"}, {"use_dora": True}], ids=str
)
def test_resuming_goes_on_bit_for_bit(attach, fields):
    """The adapter's own step counter decides, whenever the state comes in."""
    straight = build(**fields)
    adam = optimizer_of(straight)
    RankController(straight, adam, STEPS, seed=SEED)
    train(straight, adam, 17)
    saved = copy.deepcopy(peft.get_peft_model_state_dict(straight)), copy.deepcopy(adam.state_dict())
    train(straight, adam, 12, start=17)

    resumed = build(perturbed=False, **fields)
    adam = optimizer_of(resumed)
    if attach == "before loading":
        controller = RankController(resumed, adam, STEPS, seed=SEED)
    peft.set_peft_model_state_dict(resumed, saved[0])
    adam.load_state_dict(saved[1])
    if attach == "after loading":
        controller = RankController(resumed, adam, STEPS, seed=SEED)
    assert controller.step == 17
    assert controller.policy.draw(SEED, 0) != controller.policy.draw(SEED, 17) == spans(resumed)[0].end
    train(resumed, adam, 12, start=17)
    for name, value in factors(straight).items():
        assert torch.equal(value, factors(resumed)[name]), name


# --- optimizer semantics


@pytest.mark.parametrize("update", ["frozen", "all"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
    ],
    ids=str,
)
def test_strict_holds_fast_what_a_step_does_not_train(update, kind, options):
    """Values and optimizer state, bit for bit, weight decay included, from the very first step."""
    model = build(optimizer_semantics="strict", update=update)
    optimizer = optimizer_of(model, kind, **options)
    RankController(model, optimizer, STEPS, seed=2)
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    moved = Counter()
    for number in range(12):
        span = spans(model)[0]
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        state = {name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in parameters.items()}
        step(model, optimizer, number)
        for name, parameter in parameters.items():
            rows, old = components(name, parameter), components(name, before[name])
            for i in range(4):
                trained = span.first <= i < span.end
                assert torch.equal(rows[i], old[i]) != trained, (name, i, span)
                moved[i] += trained
                for key, value in optimizer.state[parameter].items():
                    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                        continue
                    remembered = components(name, value)[i]
                    if not trained and key in state[name]:
                        assert torch.equal(remembered, components(name, state[name][key])[i])
                    elif not trained:
                        assert not remembered.any()
    assert len(moved) == 4


def test_in_reference_semantics_momentum_and_decay_move_what_is_not_trained():
    """As in the authors' code: a zero gradient is not the same as none."""
    model = build()
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS, seed=2)
    train(model, optimizer, 4)
    span, before = spans(model)[0], factors(model)
    step(model, optimizer, 4)
    for name, value in factors(model).items():
        rows = (components(name, value) - components(name, before[name])).abs().amax(1)
        assert rows.all()
        assert span.end - span.first == 1

    # Without momentum and decay nothing else moves: gradients of other components are exactly zero.
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    RankController(model, optimizer, STEPS, seed=2)
    span, before = spans(model)[0], factors(model)
    step(model, optimizer, 0)
    for name, value in factors(model).items():
        rows = (components(name, value) - components(name, before[name])).abs().amax(1)
        assert [bool(row) for row in rows] == [span.first <= i < span.end for i in range(4)]


def test_strict_says_where_an_optimizer_cannot_be_held():
    from transformers import Adafactor

    model = build(optimizer_semantics="strict")
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad], lr=0.01, relative_step=False)
    RankController(model, optimizer, STEPS)
    before, span = factors(model), spans(model)[0]
    with pytest.warns(UserWarning, match="Adafactor keeps state that components share"):
        step(model, optimizer, 0)
    for name, value in factors(model).items():
        for i, (row, old) in enumerate(zip(components(name, value), components(name, before[name]), strict=True)):
            assert torch.equal(row, old) != (span.first <= i < span.end)


# --- what is learnt


class Regression(nn.Module):
    """One layer to adapt; the target differs from it by a matrix of rank 4 with falling singular values."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(0.2 * torch.randn(16, 16, generator=generator))
        left, right = (torch.linalg.qr(torch.randn(16, 16, generator=generator))[0] for _ in range(2))
        self.difference = left[:, :4] @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ right[:4]
        self.target = self.layer.weight.detach() + self.difference

    def forward(self, x):
        return (self.layer(x) - x @ self.target.T).square().mean()


def losses(config, steps=1200):
    """The loss at every rank after training; for plain LoRA, cut with its alpha kept."""
    torch.manual_seed(1)
    model = peft.get_peft_model(Regression(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if isinstance(config, DyLoraConfig):
        RankController(model, optimizer, steps)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - number / steps)
        optimizer.zero_grad()
        model(torch.randn(64, 16, generator=torch.Generator().manual_seed(number))).backward()
        optimizer.step()
    (_, update) = next(iter(updates(model)))
    base, found = model.get_base_model(), []
    for b in range(1, 5):
        cut = config.lora_alpha / (b if isinstance(config, DyLoraConfig) else 4)
        delta = (cut * update.lora_B[:, :b] @ update.lora_A[:b]).detach()
        found.append(float((delta - base.difference).square().sum(1).mean()))
    return found


@pytest.mark.parametrize("update", ["frozen", "all"])
def test_leading_components_learn_to_work_alone(update):
    """Loss falls with the rank, and at low ranks it is far below that of a LoRA that was cut; the best possible loss at
    b is what the singular values beyond b leave."""
    nested = losses(DyLoraConfig(r=4, lora_alpha=4, target_modules=["layer"], update=update))
    cut = losses(RankConfig(r=4, lora_alpha=4, target_modules=["layer"]))
    best = [sum(s * s for s in (4.0, 3.0, 2.0, 1.0)[b:]) / 16 for b in range(1, 5)]
    assert nested == sorted(nested, reverse=True)
    for b in (1, 2):
        assert nested[b - 1] < 0.8 * cut[b - 1]
    for loss, floor in zip(nested[:3], best, strict=False):
        assert floor * 0.999 <= loss
    assert nested[0] < 1.35 * best[0]
    assert nested[3] < 0.35 * nested[0]


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_r": 0}, "min_r=0"),
        ({"min_r": 9}, "min_r=9 is above r=8"),
        ({"block_size": 3}, "r=8 is not a multiple of block_size=3.*Set r to 9"),
        ({"block_size": True}, "block_size=True"),
        ({"ranks": []}, "must be a list of whole numbers"),
        ({"ranks": 4}, "must be a list of whole numbers"),
        ({"ranks": [0, 8]}, "must be a list of whole numbers"),
        ({"ranks": [1, True, 8]}, "must be a list of whole numbers"),
        ({"ranks": [1, 4, 2, 8]}, "must ascend"),
        ({"ranks": [1, 1, 8]}, "must ascend"),
        ({"ranks": [1, 2, 4]}, "must end with r=8, the highest rank: set r to 4"),
        ({"ranks": [1, 8], "min_r": 2}, "begins below min_r=2"),
        ({"ranks": [2, 3, 8], "block_size": 2}, "3 is not a multiple of block_size=2"),
        ({"update": "half"}, "update='half' must be one of 'frozen', 'all'"),
        ({"optimizer_semantics": "lax"}, "optimizer_semantics='lax'"),
        ({"rank_distribution": "geometrical"}, "Did you mean 'geometric'"),
        ({"rank_distribution": [1.0] * 7}, "7 weights for 8 ranks"),
        ({"rank_distribution": [1.0] * 3, "ranks": [1, 8]}, r"3 weights for 2 ranks \(1, 8\)"),
        ({"rank_distribution": [0.0] + [1.0] * 7}, "finite numbers above 0"),
        ({"rank_distribution": [math.inf] + [1.0] * 7}, "finite numbers above 0"),
        ({"rank_distribution": [math.nan] * 8}, "finite numbers above 0"),
        ({"rank_distribution": {"1": 2}}, "finite numbers above 0"),
        ({"geometric_p": 0.0}, "geometric_p=0.0"),
        ({"geometric_p": 1.0}, "geometric_p=1.0"),
        ({"geometric_p": "0.5"}, "geometric_p='0.5'"),
        ({"rank_pattern": {"wide": 9}}, r"rank_pattern\['wide'\]=9 is above r=8"),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DyLoraConfig(r=8, **fields)


@pytest.mark.parametrize("b", [0, 5, -1, 2.0, "2", None, True], ids=repr)
def test_a_rank_that_does_not_exist_is_refused(b):
    model = build()
    with pytest.raises(ValueError, match=r"was trained at: \[1, 2, 3, 4\]"):
        ranktune.set_rank(model, b)
    with pytest.raises(ConfigError), at_rank(model, b):
        pass
    assert ranktune.total_rank(model) == 12


@pytest.mark.parametrize("fields", [{"ranks": [2, 4]}, {"block_size": 2}, {"min_r": 2}], ids=str)
def test_a_rank_that_was_not_trained_is_refused(fields, tmp_path):
    model = build(**fields)
    with pytest.raises(ConfigError, match=r"rank 1 is not among those that adapter 'default' was trained at: \[2"):
        ranktune.set_rank(model, 1)
    with pytest.raises(ConfigError, match="rank 1 is not among"):
        ranktune.export_lora(model, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [RankConfig, ranktune.DynamicDoraConfig])
def test_only_a_nested_adapter_has_a_rank_to_set(other):
    model = build(config_class=other)
    with pytest.raises(ConfigError, match=f"is of method '{other.method_name}'"):
        ranktune.set_rank(model, 1)
    with pytest.raises(ConfigError, match="no ranktune adapter 'missing'"):
        ranktune.set_rank(build(), 1, "missing")


def test_the_fields_survive_the_file(tmp_path):
    config = DyLoraConfig(
        r=8, target_modules=TARGETS, ranks=(2, 4, 8), rank_distribution=(3, 1.5, 1), update="all",
        optimizer_semantics="strict", block_size=2, use_dora=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    assert config.ranks == [2, 4, 8]


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_export_at_b_is_the_adapter_at_b(use_dora, tmp_path):
    model, x = build(use_dora=use_dora).eval(), inputs()
    for b in range(1, 5):
        exported = ranktune.export_lora(model, tmp_path / str(b), rank=b)
        assert exported.ranks == dict.fromkeys(TARGETS, b)
        plain = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path / str(b)).eval()
        assert plain.peft_config["default"].r == b
        with at_rank(model, b):
            torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    ranktune.set_rank(model, 3)
    assert ranktune.export_lora(model, tmp_path / "set").ranks == dict.fromkeys(TARGETS, 3)
