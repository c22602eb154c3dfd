"""IncreLoRA against its specification: scores, averages, penalty, rounds, and runs from rank 1 to the target."""

from __future__ import annotations

import itertools
import math
from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ranktune
from ranktune import ConfigError, IncreLoraConfig, RankController, orthogonality
from ranktune.adapters import updates
from ranktune.methods.increlora import IncreLoraPolicy
from ranktune.policy import Layout, RankState
from tests.methods import TARGETS, Linears, build_base, inputs, perturb

# Where only a score or a penalty is looked at, nobody moves ranks.
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")

STEPS = 60
# Rounds at t = 10, 15, 20, ... of one module by 2: 9 components to give take five rounds.
FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "grow_interval": 5, "top_h": 1, "grow_by": 2}
FIRST, LAST = 10, 30


def build(kind="Linear", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    return peft.get_peft_model(build_base(kind, dtype), IncreLoraConfig(**{**FIELDS, **fields}))


def optimizer_of(model, kind=torch.optim.AdamW, lr=0.02, **options):
    return kind(ranktune.parameter_groups(model, lr=lr, weight_decay=0.01), lr=lr, **options)


def loss_of(model, seed, dtype=torch.float32):
    return (model(inputs(dtype, seed=seed)) - 1.0).square().mean()


def train(model, optimizer, steps, seed=0, after=None):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed + step).backward()
        optimizer.step()
        if after is not None:
            after(step)


def by_name(model):
    return dict(updates(model))


def layer_of(model, name):
    return getattr(model.base_model.model, name)


def layout(count, costs=None):
    return Layout(tuple(f"m{i}" for i in range(count)), torch.tensor([1] * count if costs is None else costs))


def simulate(config, count, total_steps, scores, costs=None):
    """The policy alone: totals after each step, and the rounds as (step, grown [M])."""
    policy = IncreLoraPolicy(config, layout(count, costs), total_steps)
    active = torch.arange(config.capacity) < torch.full((count, 1), config.init_r)
    average = torch.zeros(count, 2)
    rounds = []
    for step in range(total_steps):
        ranks = active.sum(1).tolist()
        if policy.has_ended(step, ranks):
            break
        if not policy.measures(step):
            assert policy.decide(RankState(step, active, average)) is None
            continue
        average = policy.observe(RankState(step, active, average), scores(step)).average
        chosen = policy.decide(RankState(step, active, average))
        if chosen is not None:
            rounds.append((step, (chosen.sum(1) - active.sum(1)).tolist()))
            assert (chosen | ~active).all(), "the active ones stay active"
            active = chosen
            assert int((active.sum(1) * policy.costs).sum()) <= policy.target
    return policy, active.sum(1), rounds


def random_scores(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda _: torch.rand(count, generator=generator)


# Rounds and totals


@pytest.mark.parametrize(
    ("r", "top_h", "grow_by", "interval", "total_steps", "rounds"),
    [
        (8, 22, 4, 500, 16_370, 6),  # QNLI, r = 8: the reference overshoots to 600
        (8, 10, 4, 100, 3_450, 13),  # MRPC, r = 8: 592
        (2, 6, 1, 100, 3_450, 12),  # MRPC, r = 2
        (2, 5, 1, 100, 3_900, 15),  # RTE, r = 2
        (8, 18, 1, 1000, 85_904, 28),  # MNLI, r = 8
    ],
)
def test_the_papers_runs_end_on_the_target_to_the_unit(r, top_h, grow_by, interval, total_steps, rounds):
    config = IncreLoraConfig(r=r, top_h=top_h, grow_by=grow_by, grow_interval=interval, score_window=1)
    _, ranks, held = simulate(config, 72, total_steps, random_scores(72))
    assert int(ranks.sum()) == 72 * r
    assert [step for step, _ in held] == [interval * (n + 2) for n in range(rounds)]


def test_with_twelve_to_give_three_modules_get_five_five_and_two():
    config = IncreLoraConfig(r=4, grow_by=5, top_h=4, grow_interval=5, score_window=1)
    _, _, rounds = simulate(config, 4, 100, lambda _: torch.tensor([0.3, 0.1, 0.4, 0.2]))
    assert rounds == [(10, [5, 0, 5, 2])]


@pytest.mark.parametrize(("top_h", "grow_by"), [(1, 1), (3, 1), (5, 2), (7, 4), (72, 7), (10, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_any_top_h_and_grow_by_end_on_the_target(top_h, grow_by, seed):
    config = IncreLoraConfig(r=5, top_h=top_h, grow_by=grow_by, grow_interval=5, max_r=9, score_window=1)
    policy, ranks, rounds = simulate(config, 20, 2000, random_scores(20, seed))
    assert int(ranks.sum()) == 100
    assert int(ranks.max()) <= 9
    for step, grown in rounds:
        assert policy.schedule.is_event(step)
        assert sum(n > 0 for n in grown) <= top_h
        assert max(grown) <= grow_by
    given = [sum(sum(grown) for at, grown in rounds if at < step) for step in range(2000)]
    assert all(20 + total <= policy.budget(step) for step, total in enumerate(given))
    assert policy.budget(2000) == 100


@pytest.mark.parametrize("count", [3, 7])
def test_where_every_module_has_to_be_filled_the_target_is_met_in_time(count):
    """max_r = r leaves no choice but how soon: always the same module first would run out of rounds."""
    config = IncreLoraConfig(r=6, max_r=6, top_h=2, grow_by=1, grow_interval=2, score_window=1)
    needed = math.ceil(count * 5 / 2)
    for total_steps in range(2 * (needed + 2) - 1, 2 * (needed + 2) + 9):
        _, ranks, _ = simulate(config, count, total_steps, lambda _: torch.arange(float(count)))
        assert ranks.tolist() == [6] * count, total_steps


def test_equal_scores_admit_exactly_top_h_the_first_ones():
    config = IncreLoraConfig(r=2, top_h=3, grow_by=1, grow_interval=5, score_window=1)
    _, _, rounds = simulate(config, 7, 100, lambda _: torch.ones(7))
    assert [sum(grown) for _, grown in rounds] == [3, 3, 1]
    assert rounds[0][1] == [1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_a_parameter_budget_is_kept_and_spent_to_less_than_a_component(seed):
    costs = [1537] * 4 + [3841] * 2
    target = int(torch.randint(sum(costs), 8 * sum(costs), (1,), generator=torch.Generator().manual_seed(seed)))
    config = IncreLoraConfig(target_params=target, score_window=1)
    _, ranks, _ = simulate(config, 6, 1000, random_scores(6, seed), costs)
    spent = int((ranks * torch.tensor(costs)).sum())
    assert target - 1537 < spent <= target


def test_by_default_growth_ends_at_about_half_of_the_run():
    for count, total_steps in itertools.product((12, 72), (200, 1000, 3450)):
        policy, ranks, rounds = simulate(IncreLoraConfig(r=8), count, total_steps, random_scores(count))
        assert int(ranks.sum()) == 8 * count
        assert policy.schedule.interval == max(5, total_steps // 100)
        assert policy.grow_by == 4
        assert rounds[-1][0] <= total_steps // 2
        assert rounds[-1][0] > 0.2 * total_steps


@pytest.mark.parametrize("warmup", [0, 5, 7, 10, 33])
def test_the_first_round_is_the_smallest_multiple_of_the_interval_above_the_warmup(warmup):
    config = IncreLoraConfig(r=2, top_h=2, grow_interval=5, warmup_ratio=warmup / 100, score_window=3)
    policy, _, rounds = simulate(config, 4, 100, random_scores(4))
    assert rounds[0][0] == (warmup // 5 + 1) * 5
    scored = [step for step in range(100) if policy.measures(step)]
    assert scored[:3] == [rounds[0][0] - 2, rounds[0][0] - 1, rounds[0][0]]
    assert policy.schedule.rounds_before(100) == len([s for s in range(100) if policy.schedule.is_event(s)])
    assert policy.schedule.rounds_from(51) == len([s for s in range(51, 100) if policy.schedule.is_event(s)])


@pytest.mark.parametrize(
    ("fields", "total_steps", "message"),
    [
        ({"target_params": 5000, "max_r": 40}, 100, r"5,000 parameters is above .*3 modules x max_r=40 = 3,440"),
        ({"target_params": 50}, 100, r"50 parameters is below the start: 3 modules x init_r=1 = 86"),
        (
            {},
            11,
            r"total_steps=11 is too short.*1 rounds \(every 5 steps after step 5\) x 1 modules x 2 = 2 comp",
        ),
        ({}, 11, "where 9 components are to be added"),
        ({"warmup_ratio": 0.9}, 60, r"total_steps=60 is too short.*1 rounds \(every 5 steps after step 54\)"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_arithmetic(fields, total_steps, message):
    model = build(**fields)
    with pytest.raises(ConfigError, match=message):
        RankController(model, optimizer_of(model), total_steps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_r": 7}, "max_r=7 must be a whole number, at least 8"),
        ({"init_r": 9}, "r=8 is below init_r=9: ranks only grow"),
        ({"init_r": 0}, "init_r=0"),
        ({"grow_by": 0}, "grow_by=0"),
        ({"top_h": -1}, "top_h=-1"),
        ({"score_window": "some"}, "score_window='some'"),
        ({"score_norm": "max"}, "score_norm='max' must be 'sqrt' or 'mean'"),
        ({"beta2": 1.0}, r"beta2=1.0 must be a number in \[0, 1\)"),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0"),
        ({"orth_weight": -1.0}, "orth_weight=-1.0 must not be negative"),
        ({"restart_warmup": 1}, "restart_warmup=1 must be true or false"),
        ({"rank_pattern": {"wide": 2}}, "rank_pattern cannot be used with increlora"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        IncreLoraConfig(**fields)


# Averages


def test_the_averages_follow_their_recurrences():
    """Against scalars; the uncertainty takes the new sensitivity average."""
    policy = IncreLoraPolicy(IncreLoraConfig(r=2, beta1=0.8, beta2=0.6), layout(3), 1000)
    state = RankState(0, torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.float64))
    expected = [[0.0, 0.0] for _ in range(3)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(9):
        S = torch.rand(3, generator=draw, dtype=torch.float64)
        state = policy.observe(state, S)
        for module, s in enumerate(S.tolist()):
            i, u = expected[module]
            i = 0.8 * i + 0.2 * s
            expected[module] = [i, 0.6 * u + 0.4 * abs(s - i)]
    torch.testing.assert_close(state.average, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    product = torch.tensor([[i * u] for i, u in expected], dtype=torch.float64)
    torch.testing.assert_close(policy.importance(state), product, rtol=1e-14, atol=0)


def test_a_window_of_forty_steps_gives_the_same_averages_as_all():
    policy = IncreLoraPolicy(IncreLoraConfig(r=2), layout(5), 10_000)
    found = []
    for first in (0, 160):
        draw = torch.Generator().manual_seed(0)
        state = RankState(0, torch.ones(5, 8, dtype=torch.bool), torch.zeros(5, 2))
        for step in range(200):
            S = torch.rand(5, generator=draw)
            state = policy.observe(state, S) if step >= first else state
        found.append(state.average)
    torch.testing.assert_close(found[0], found[1], rtol=0.01, atol=0)


# Scores


def give_leaves(model):
    for _, update in updates(model):
        dtype = torch.promote_types(update.lora_A.dtype, torch.float32)
        update.score = torch.zeros(1, dtype=dtype, requires_grad=True)


def scores(model):
    return {name: update.score.grad for name, update in updates(model)}


def materialised(layer, dW, x, dropout):
    """The layer with dW [out, in] a leaf of its own: what forward is defined to be."""
    update = layer.update_of("default")
    base = layer.frozen()
    dropped = F.dropout(x, dropout)
    y = F.linear(x, base.weight)
    low_rank = F.linear(dropped, dW)
    if update.decomposed:
        offset = update.lora_magnitude_vector / (base.weight + dW.detach()).norm(dim=1) - 1
        through = F.linear(dropped, base.weight) if dropout else y
        y = y + offset * (through + low_rank)
    y = y + low_rank
    return y if base.bias is None else y + base.bias


def grown(kind="Linear", dtype=torch.float64, **fields):
    """A model in the middle of growth, with ranks 1, 3, 5, reserves, and gates far from zero."""
    model = perturb(build(kind, dtype, **fields))
    for rank, update in zip((1, 3, 5), by_name(model).values(), strict=True):
        while update.rank_now < rank:
            update.stock(2, 0, 0.3)
            update.promote(2, 0, keep_output=False)
        update.stock(2, 0, 0.3)
    return model.train()


@pytest.mark.parametrize("path", ["fused", "hooked"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_score_is_that_of_an_explicit_leaf(kind, dropout, use_dora, path):
    """sum |dW o dL/d(dW)|, of two calls added up, and everything else as it was."""
    model = grown(kind, lora_dropout=dropout, use_dora=use_dora)
    give_leaves(model)
    for name, update in by_name(model).items():
        layer = layer_of(model, name)
        if path == "hooked":
            layer.base_layer.register_forward_hook(lambda *_: None)
        A, B, scale = update.factors(layer.scaling["default"])
        assert scale == pytest.approx(6 / update.rank_now)
        expected = torch.zeros(1, dtype=torch.float64)
        for call in range(2):
            x = torch.randn(7, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(call))
            weights = torch.randn(
                7, layer.out_features, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
            )
            dW = (scale * B @ A).detach().requires_grad_()
            torch.manual_seed(call)
            y = materialised(layer, dW, x, dropout)
            (y.sin() * weights).sum().backward()
            expected += (dW * dW.grad).abs().sum()
            torch.manual_seed(call)
            ours = layer(x)
            torch.testing.assert_close(ours, y, rtol=1e-10, atol=1e-10)
            (ours.sin() * weights).sum().backward()
        torch.testing.assert_close(update.score.grad, expected, rtol=1e-10, atol=0)
        assert layer.frozen().weight.grad is None


@pytest.mark.parametrize("path", ["fused", "hooked"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gates_in_reserve_are_held_fast_and_vectors_in_reserve_learn(use_dora, path):
    """A gradient would stay behind in the optimizer's moments, even where the gate itself is put back."""
    model = grown(use_dora=use_dora)
    for name, update in by_name(model).items():
        if path == "hooked":
            layer_of(model, name).base_layer.register_forward_hook(lambda *_: None)
        assert update.rank_now < update.window < update.capacity
    loss_of(model, 0, torch.float64).backward()
    for update in by_name(model).values():
        rank, window = update.rank_now, update.window
        assert (update.gate.grad[:rank] != 0).all()
        assert (update.gate.grad[rank:] == 0).all()
        for listed in (update.lora_A.grad, update.lora_B.grad.T):
            assert (listed[:window] != 0).any(1).all()
            assert (listed[window:] == 0).all()


def test_asking_for_scores_changes_nothing_else():
    results = []
    for asked in (False, True):
        model = grown(dtype=torch.float32, lora_dropout=0.3, use_dora=True)
        if asked:
            give_leaves(model)
        torch.manual_seed(3)
        y = model(inputs())
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_scores_under_gradient_checkpointing(use_reentrant):
    found = []
    for checkpointed in (False, True):
        model = grown(lora_dropout=0.3)
        give_leaves(model)
        torch.manual_seed(5)
        x = inputs(torch.float64).requires_grad_()
        run = partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=use_reentrant) if checkpointed else model
        run(x).square().sum().backward()
        found.append(scores(model))
    assert found[0] == found[1]


# Torch's own tracing of an autograd.Function warns about itself.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@traced
@pytest.mark.parametrize("use_dora", [False, True])
def test_scores_when_compiled(use_dora):
    torch._dynamo.reset()
    model = grown(dtype=torch.float32, use_dora=use_dora)
    give_leaves(model)
    model(inputs()).square().sum().backward()
    expected = scores(model)
    give_leaves(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(inputs()).square().sum().backward()
    for name, score in scores(model).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=0)


@traced
def test_growing_does_not_recompile():
    torch._dynamo.reset()
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for step in range(40):
        optimizer.zero_grad()
        (compiled(inputs(seed=step)) - 1.0).square().mean().backward()
        optimizer.step()
    assert controller.total_rank() == 12
    assert len(controller.history) == 5
    assert graphs.frame_count <= 2, "one graph that scores, one that does not"


def test_scores_in_bfloat16_are_near():
    model = grown(dtype=torch.float32)
    give_leaves(model)
    model(inputs()).square().sum().backward()
    expected = scores(model)
    give_leaves(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs()).square().sum()
    loss.backward()
    for name, score in scores(model).items():
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, expected[name], rtol=0.1, atol=0)


def test_blocks_of_rows_add_up(monkeypatch):
    model = grown()
    give_leaves(model)
    model(inputs(torch.float64)).sum().backward()
    expected = scores(model)
    monkeypatch.setattr("ranktune.sensitivity._BLOCK", 30)
    give_leaves(model)
    model(inputs(torch.float64)).sum().backward()
    for name, score in scores(model).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("norm", "power"), [("sqrt", 0.5), ("mean", 1.0)])
def test_the_score_is_normed_by_the_modules_size(norm, power):
    model = grown()
    give_leaves(model)
    model(inputs(torch.float64)).sum().backward()
    policy = IncreLoraPolicy(IncreLoraConfig(r=4, score_norm=norm), layout(3), 1000)
    sizes = torch.tensor([12 * 12, 12 * 20, 20 * 7], dtype=torch.float64)
    raw = torch.cat(list(scores(model).values()))
    torch.testing.assert_close(policy.measure(list(by_name(model).values())), raw / sizes**power)


def averages(model):
    return torch.stack([update.rank_average for update in by_name(model).values()])


def test_accumulated_micro_batches_add_up():
    found = []
    for micro_batches in (1, 3):
        model = grown(dtype=torch.float32)
        give_leaves(model)
        for _ in range(micro_batches):
            loss_of(model, 1).backward()
        found.append(torch.cat(list(scores(model).values())))
    torch.testing.assert_close(found[1], 3 * found[0])


@pytest.mark.parametrize("fused", [True, False])
def test_under_a_scaler_scores_are_those_of_full_precision(fused):
    found = []
    for scaled in (False, True):
        model = build()
        optimizer = optimizer_of(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        RankController(model, optimizer, STEPS, scaler=scaler)
        for step in range(14):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(averages(model))
    assert (found[0] > 0).any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_scores_of_a_step_that_a_scaler_skips_are_left_out(fused):
    """Without a fused optimizer no hook tells of the skip; the lowered loss scale does."""
    model = build(score_window="all")
    optimizer = optimizer_of(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    controller = RankController(model, optimizer, STEPS, scaler=scaler)
    for attempt in range(STEPS + 1):
        optimizer.zero_grad()
        before = averages(model)
        # Large enough to overflow the gradients, not the scores.
        scaler.scale(loss_of(model, attempt) * (1e36 if attempt == 7 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if attempt in (7, 8):
            assert torch.equal(averages(model), before)
        assert averages(model).max() < 1e6
    assert controller.step == STEPS
    assert controller.total_rank() == 12


def test_scores_are_taken_in_the_window_and_never_after_the_target(monkeypatch):
    calls = []
    measured = ranktune.sensitivity.sensitivity
    monkeypatch.setattr("ranktune.lowrank.sensitivity", lambda *args: (calls.append(now), measured(*args))[1])
    model = build(score_window=3)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    for now in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, now).backward()
        optimizer.step()
    assert controller.ended
    windows = [range(event - 2, event + 1) for event in range(FIRST, LAST + 1, 5)]
    assert sorted(set(calls)) == [step for window in windows for step in window]
    assert len(calls) == 3 * 3 * len(windows)
    assert all(update.score is None for update in by_name(model).values())


# Penalty


def test_the_penalty_sees_orthogonality_between_rows():
    policy = IncreLoraPolicy(IncreLoraConfig(r=2, orth_weight=6.0), layout(3), 1000)
    model = build(init_r=2, r=2)
    found = list(by_name(model).values())
    with torch.no_grad():
        for update in found:
            nn.init.orthogonal_(update.lora_A[:2])
            nn.init.orthogonal_(update.lora_B[:, :2])
    assert float(policy.penalty(found).detach()) < 1e-4
    for update in found:
        update.lora_A.grad, update.lora_B.grad = torch.zeros_like(update.lora_A), torch.zeros_like(update.lora_B)
    policy.add_penalty_gradients(found)
    assert all(torch.isfinite(vectors.grad).all() for update in found for vectors in (update.lora_A, update.lora_B))
    with torch.no_grad():
        found[1].lora_A[1] = found[1].lora_A[0]  # two identical unit rows
    torch.testing.assert_close(policy.penalty(found).detach(), torch.tensor(math.sqrt(2.0)), rtol=1e-4, atol=0)
    found[1].stock(1, 0, 1e-5)
    with_reserve = float(policy.penalty(found).detach())
    assert with_reserve > math.sqrt(2.0) + 0.5
    found[1].dissolve_reserve()
    torch.testing.assert_close(policy.penalty(found).detach(), torch.tensor(math.sqrt(2.0)), rtol=1e-4, atol=0)


def test_the_penaltys_gradient_is_exact():
    model = grown()
    found = list(by_name(model).values())
    policy = IncreLoraPolicy(IncreLoraConfig(r=4, orth_weight=0.7), layout(3), 1000)
    terms = [
        (X @ X.T - torch.eye(len(X), dtype=X.dtype)).norm()
        for update in found
        for X in (update.lora_A[: update.window], update.lora_B[:, : update.window].T)
    ]
    expected = 0.7 / 6 * sum(terms)
    penalty = policy.penalty(found)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    expected.backward()
    vectors = [vectors for update in found for vectors in (update.lora_A, update.lora_B)]
    slopes = [each.grad for each in vectors]
    for each in vectors:
        each.grad = torch.ones_like(each)
    vectors[0].grad = None
    policy.add_penalty_gradients(found, 3.0)
    assert vectors[0].grad is None
    for each, slope in zip(vectors[1:], slopes[1:], strict=True):
        torch.testing.assert_close(each.grad, 1.0 + 3.0 * slope, rtol=1e-9, atol=1e-12)


def test_the_penalty_moves_no_reserve_that_does_not_learn():
    """It is part of the distance, as in the authors' code, and stays where it is."""
    model = grown(advance_learning=False)
    found = list(by_name(model).values())
    policy = IncreLoraPolicy(IncreLoraConfig(r=4, orth_weight=0.7, advance_learning=False), layout(3), 1000)
    policy.penalty(found).backward()
    slopes = [(update.lora_A.grad, update.lora_B.grad) for update in found]
    for update in found:
        update.lora_A.grad, update.lora_B.grad = torch.zeros_like(update.lora_A), torch.zeros_like(update.lora_B)
    policy.add_penalty_gradients(found)
    for update, (dA, dB) in zip(found, slopes, strict=True):
        rank = update.rank_now
        assert rank < update.window
        for gradient, slope in ((update.lora_A.grad, dA), (update.lora_B.grad.T, dB.T)):
            torch.testing.assert_close(gradient[:rank], slope[:rank], rtol=1e-9, atol=1e-12)
            assert (slope[rank : update.window] != 0).any()
            assert (gradient[rank:] == 0).all()


@pytest.mark.parametrize("at_a_time", [1, 20, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_slopes_are_added_in_the_gradients_own_type(monkeypatch, dtype, at_a_time):
    """Of 16-bit vectors too, whose distance is taken in float32; however many matrices are worked on at a time."""
    monkeypatch.setattr(orthogonality, "_BATCH", at_a_time)
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 8), (2, 8), (3, 5), (3, 8), (2, 5), (1, 8)]
    terms, expected = [], []
    for trained, (k, length) in enumerate(sizes):
        X, start = (torch.randn(k, length, generator=generator).to(dtype) for _ in range(2))
        exact = X.double().requires_grad_()
        (0.1 * (exact @ exact.T - torch.eye(k, dtype=torch.float64)).norm()).backward()
        rows = slice(0, max(1, trained % (k + 1)))
        terms.append((X, start[rows].clone()))
        expected.append((start.double() + exact.grad).to(dtype)[rows])
    orthogonality.add_slopes(terms, 0.1)
    for (_, gradient), slope in zip(terms, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, slope, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_hooked_penalty_equals_one_in_the_loss():
    """Once per optimizer step, under accumulation, through growth."""
    paths = []
    for in_loss in (False, True):
        model = build(orth_weight=0.5)
        optimizer = optimizer_of(model, torch.optim.SGD)
        controller = RankController(model, optimizer, STEPS, penalty_in_loss=in_loss)
        for step in range(14):
            optimizer.zero_grad()
            for micro in range(2):
                loss = loss_of(model, 2 * step + micro) / 2
                if in_loss and micro == 1:
                    loss = loss + controller.penalty()
                loss.backward()
            optimizer.step()
        assert controller.total_rank() == 5
        paths.append([p.detach().clone() for n, p in model.named_parameters() if "ranktune_" in n])
    for hooked, added in zip(*paths, strict=True):
        torch.testing.assert_close(hooked, added, rtol=1e-5, atol=1e-7)


def test_a_model_without_storage_shows_the_starting_rank():
    with torch.device("meta"):
        model = peft.get_peft_model(Linears(), IncreLoraConfig(r=4, target_modules=TARGETS))
    assert ranktune.ranks(model) == dict.fromkeys(TARGETS, 1)
