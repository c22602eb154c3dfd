"""Dynamic DoRA against its specification: scores, average, penalty, pruning, and a run from start to final ranks."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import ranktune
from ranktune import ConfigError, DynamicDoraConfig, RankController
from ranktune.adapters import updates
from ranktune.methods.dynamic_dora import DynamicDoraPolicy, component_shares
from ranktune.policy import Layout, RankState
from tests.methods import TARGETS, build_base, inputs, perturb

STEPS = 60


def build(**fields):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "prune_interval": 3, **fields}
    return peft.get_peft_model(build_base("Linear"), DynamicDoraConfig(**fields))


def optimizer_of(model, kind=torch.optim.AdamW, lr=0.02, **options):
    return kind(ranktune.parameter_groups(model, lr=lr, weight_decay=0.01), lr=lr, **options)


def train(model, optimizer, steps, seed=0, after=None):
    for step in range(steps):
        optimizer.zero_grad()
        (model(inputs(seed=seed + step)) - 1.0).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


def layout(count=3, costs=None):
    costs = [1] * count if costs is None else costs
    return Layout(tuple(f"m{i}" for i in range(count)), torch.tensor(costs))


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_equal_the_dense_norms():
    A, B, c = draw(3, 5, 8, seed=0), draw(3, 9, 5, seed=1), draw(3, 5, seed=2)
    shares = component_shares(A, B, c)
    for module in range(3):
        components = [c[module, i] * torch.outer(B[module, :, i], A[module, i]) for i in range(5)]
        expected = torch.stack([part.norm() for part in components]) / (sum(components).norm() + 1e-8)
        torch.testing.assert_close(shares[module], expected, rtol=1e-12, atol=0)


def test_shares_are_invariant_to_how_a_component_is_split():
    A, B, c = draw(2, 4, 8, seed=0), draw(2, 9, 4, seed=1), draw(2, 4, seed=2)
    torch.testing.assert_close(component_shares(3 * A, B / 3, c), component_shares(A, B, c), rtol=1e-9, atol=0)
    assert (component_shares(A, B, c).sum(1) >= 1 - 1e-9).all()


def test_shares_of_an_untouched_adapter_are_zero_not_nan():
    assert torch.equal(component_shares(draw(1, 3, 4, seed=0), draw(1, 5, 3, seed=1), torch.zeros(1, 3).double()).sum(),
                       torch.zeros((), dtype=torch.float64))  # fmt: skip


def test_shares_of_modules_of_different_shapes_come_in_model_order():
    model = perturb(build())
    found = [update for _, update in updates(model)]
    policy = DynamicDoraPolicy(DynamicDoraConfig(r=4), layout(), 100)
    together = policy.measure(found)
    for row, update in zip(together, found, strict=True):
        alone = component_shares(update.lora_A[None], update.lora_B[None], update.gate[None])[0]
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)


def test_the_average_of_a_constant_score():
    """S_t = s (1 - beta^t): from zero, without bias correction."""
    policy = DynamicDoraPolicy(DynamicDoraConfig(r=4, beta=0.8), layout(), 100)
    state = RankState(0, torch.ones(3, 6, dtype=torch.bool), torch.zeros(3, 6))
    score = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(7):
        state = policy.observe(state, score)
    torch.testing.assert_close(state.average, score * (1 - 0.8**7))


def test_the_penalty_is_the_mean_variance_and_its_gradient_is_exact():
    model = perturb(build(dem_weight=0.3))
    found = [update for _, update in updates(model)]
    policy = DynamicDoraPolicy(DynamicDoraConfig(r=4, dem_weight=0.3), layout(), 100)
    vectors = [row for u in found for row in u.lora_A] + [column for u in found for column in u.lora_B.T]
    assert len(vectors) == 2 * 3 * 6
    expected = 0.3 * sum(vector.var() for vector in vectors) / len(vectors)
    penalty = policy.penalty(found)
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=0)
    penalty.backward()
    vectors = [vectors for update in found for vectors in (update.lora_A, update.lora_B)]
    expected = [each.grad for each in vectors]
    for each in vectors:
        each.grad = torch.ones_like(each)
    policy.add_penalty_gradients(found, 3.0)
    for each, slope in zip(vectors, expected, strict=True):
        torch.testing.assert_close(each.grad - 1.0, 3.0 * slope, rtol=1e-4, atol=1e-7)
    assert all(update.gate.grad is None for update in found)


def test_a_hooked_penalty_equals_one_in_the_loss():
    """Once per optimizer step, under accumulation too."""
    paths = []
    for in_loss in (False, True):
        torch.manual_seed(1)
        model = perturb(build(dem_weight=5.0))
        optimizer = optimizer_of(model, torch.optim.SGD)
        controller = RankController(model, optimizer, STEPS, penalty_in_loss=in_loss)
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                loss = (model(inputs(seed=2 * step + micro)) - 1.0).square().mean() / 2
                if in_loss and micro == 1:
                    loss = loss + controller.penalty()
                loss.backward()
            optimizer.step()
        paths.append([p.detach().clone() for n, p in model.named_parameters() if "ranktune_" in n])
    for hooked, added in zip(*paths, strict=True):
        torch.testing.assert_close(hooked, added, rtol=1e-5, atol=1e-7)


def test_the_penalty_ends_with_the_window():
    policy = DynamicDoraPolicy(DynamicDoraConfig(r=4), layout(), 100)
    assert policy.schedule.end == 50
    assert policy.penalises(49)
    assert not policy.penalises(50)
    model = build()
    controller = RankController(model, optimizer_of(model), STEPS, penalty_in_loss=True)
    for _, update in updates(model):
        update.rank_step.fill_(STEPS)
    assert controller.penalty() == 0


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_run_follows_the_schedule_and_ends_on_the_budget(kind):
    torch.manual_seed(0)
    model = build()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = optimizer_of(model, kind, **options)
    controller = RankController(model, optimizer, STEPS)
    schedule = controller.policy.schedule
    assert (schedule.begin, schedule.end) == (9, 30)
    revived = 0
    was_event = False
    masks = []

    def check():
        nonlocal revived, was_event
        gates = torch.stack([update.gate.detach() for _, update in updates(model)])
        step = controller.step
        nonzero = int((gates != 0).sum())
        if schedule.is_event(step):
            assert nonzero == schedule.budget(step) == controller.total_rank()
            assert nonzero < 18 or schedule.budget(step) == 18
        elif was_event and step < schedule.end:
            revived += int(nonzero == 18)
        if step >= schedule.end:
            assert nonzero <= 12
            masks.append(torch.stack([update.rank_active for _, update in updates(model)]).clone())
            assert ((gates == 0) | masks[-1]).all()
        was_event = schedule.is_event(step) and nonzero < 18

    train(model, optimizer, STEPS, after=check)
    controller.finish()
    assert revived >= 3, "a component zeroed inside the window is trained on"
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert controller.total_rank() == ranktune.total_rank(model) == 3 * 4
    assert controller.ranks() == ranktune.ranks(model)
    for record in controller.history:
        assert record.module in TARGETS
        assert schedule.is_event(record.step)
    for module, rank in controller.ranks().items():
        changes = [change for change in controller.history if change.module == module]
        assert (changes[-1].new if changes else 6) == rank


def test_pruning_touches_no_factor():
    model = perturb(build())
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    before = {}
    chosen = controller._choose

    def choosing(state, mask):
        before.update({name: (u.lora_A.clone(), u.lora_B.clone()) for name, u in updates(model)})
        chosen(state, mask)
        for name, update in updates(model):
            assert torch.equal(update.lora_A, before[name][0])
            assert torch.equal(update.lora_B, before[name][1])

    controller._choose = choosing
    train(model, optimizer, STEPS)
    assert before


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_final_prune_clears_exactly_the_moments_of_pruned_components(kind):
    model = build()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = optimizer_of(model, kind, **options)
    controller = RankController(model, optimizer, STEPS)
    snapshots = {}
    chosen = controller._choose

    def choosing(state, mask):
        if controller.policy.is_final(state.step):
            for parameter, values in optimizer.state.items():
                snapshots[parameter] = {name: v.clone() for name, v in values.items() if isinstance(v, torch.Tensor)}
        chosen(state, mask)

    controller._choose = choosing
    train(model, optimizer, 30)
    assert snapshots
    for _, update in updates(model):
        gone = ~update.rank_active
        for parameter, component_dim in ((update.lora_A, 0), (update.lora_B, 1), (update.gate, 0)):
            for name, before in snapshots[parameter].items():
                now = optimizer.state[parameter][name]
                if now.shape != parameter.shape:
                    assert torch.equal(now, before)
                    continue
                now, before = now.movedim(component_dim, 0), before.movedim(component_dim, 0)
                assert (now[gone] == 0).all()
                assert torch.equal(now[~gone], before[~gone])
                assert (before[~gone] != 0).any()


def test_prunings_inside_the_window_leave_the_moments_alone():
    """A component that may come back goes on from its moments: without them its gate would jump."""
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    chosen = controller._choose
    seen = []

    def choosing(state, mask):
        before = copy.deepcopy([optimizer.state[update.gate] for _, update in updates(model)])
        chosen(state, mask)
        if not controller.policy.is_final(state.step) and not mask.all():
            after = [optimizer.state[update.gate] for _, update in updates(model)]
            seen.extend(
                torch.equal(old[name], new[name])
                for old, new in zip(before, after, strict=True)
                for name in ("exp_avg", "exp_avg_sq")
            )

    controller._choose = choosing
    train(model, optimizer, 29)
    assert seen
    assert all(seen)


def test_a_parameter_budget_ends_within_one_component():
    costs = {"square": 12 + 12 + 1, "wide": 12 + 20 + 1, "narrow": 20 + 7 + 1}
    model = build(target_params=311)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, STEPS)
    spent = sum(costs[name] * rank for name, rank in controller.ranks().items())
    assert 311 - min(costs.values()) < spent <= 311


def test_decomposed_pruning_never_resets_the_magnitude():
    model = build(use_dora=True)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    chosen = controller._choose
    seen = []

    def choosing(state, mask):
        before = [update.lora_magnitude_vector.clone() for _, update in updates(model)]
        chosen(state, mask)
        seen.append(all(map(torch.equal, before, (u.lora_magnitude_vector for _, u in updates(model)))))

    controller._choose = choosing
    train(model, optimizer, STEPS)
    assert seen
    assert all(seen)
    assert controller.total_rank() == 12


def test_the_score_does_not_see_lora_alpha():
    ranks = []
    for alpha in (1, 64):
        torch.manual_seed(0)
        model = perturb(build(lora_alpha=alpha))
        policy = DynamicDoraPolicy(DynamicDoraConfig(r=4), layout(), 100)
        ranks.append(policy.measure([update for _, update in updates(model)]))
    assert torch.equal(*ranks)


@pytest.mark.parametrize(
    ("fields", "total_steps", "message"),
    [
        ({"r": 4, "init_r": 4, "target_params": 10**6}, 100, r"1,000,000 parameters is above the start: 3 modules"),
        ({"r": 4, "warmup_ratio": 0.45}, 2, r"total_steps=2 is too short to prune in.*the window is steps 1 to 1"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_arithmetic(fields, total_steps, message):
    model = build(**fields)
    with pytest.raises(ConfigError, match=message):
        RankController(model, optimizer_of(model), total_steps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4, "init_r": 3}, "init_r=3 must be a whole number, at least 4"),
        ({"warmup_ratio": 0.6, "final_ratio": 0.5}, "leave no steps to prune in"),
        ({"beta": 1.0}, r"beta=1.0 must be a number in \[0, 1\)"),
        ({"prune_interval": 0}, "prune_interval=0"),
        ({"dem_weight": -1.0}, "dem_weight=-1.0 must be a finite number, at least 0"),
        ({"dem_weight": float("nan")}, "dem_weight=nan must be"),
        ({"dem_weight": float("inf")}, "dem_weight=inf must be"),
        ({"dem_weight": "0.1"}, "dem_weight='0.1' must be"),
        ({"warmup_ratio": 0.5, "final_ratio": 0.5}, "leave no steps to prune in"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio=-0.1 must be a number in \[0, 1\)"),
        ({"final_ratio": 1.0}, r"final_ratio=1.0 must be a number in \[0, 1\)"),
        ({"final_ratio": "half"}, r"final_ratio='half' must be a number in \[0, 1\)"),
        ({"beta": False}, r"beta=False must be a number in \[0, 1\)"),
        ({"target_params": 0}, "target_params=0 must be a whole number, at least 1"),
        ({"rank_pattern": {"wide": 2}}, "rank_pattern cannot be used with dynamic-dora"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DynamicDoraConfig(**fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_to_half_precision_rounds_no_gate_average_or_magnitude(dtype):
    model = perturb(build(use_dora=True))
    update = model.base_model.model.wide.update_of("default")
    update.rank_average.uniform_(generator=torch.Generator().manual_seed(0))
    wide = ("gate", "rank_average", "lora_magnitude_vector")
    before = {name: getattr(update, name).detach().clone() for name in wide}
    model.to(dtype)
    assert update.lora_A.dtype == dtype
    for name, values in before.items():
        assert getattr(update, name).dtype == torch.float32
        assert torch.equal(getattr(update, name), values), name


@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_changed_gate_changes_the_norms(detach_norm):
    """Row norms are of the gated update: on the cached path, on the differentiable one, and after a write."""
    model = perturb(build(use_dora=True, detach_norm=detach_norm)).double().eval()
    for factor in (1.0, 2.0):
        with torch.no_grad():
            for _, update in updates(model):
                update.gate.mul_(factor)
            output = model(inputs(torch.float64))
            merged = copy.deepcopy(model).merge_and_unload()(inputs(torch.float64))
        torch.testing.assert_close(output, merged, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(inputs(torch.float64)).detach(), output, rtol=1e-9, atol=1e-9)


def test_the_start_is_the_papers():
    """R = ceil(1.5 r), also of an odd r; Kaiming-uniform with a = 0 has the bound sqrt(6 / fan_in)."""
    assert [DynamicDoraConfig(r=r).start_rank for r in (1, 3, 4, 5)] == [2, 5, 6, 8]
    torch.manual_seed(0)
    update = build(r=40).base_model.model.wide.update_of("default")
    assert update.lora_A.abs().max().item() == pytest.approx((6 / 12) ** 0.5, rel=0.02)
    assert update.lora_B.abs().max().item() == pytest.approx((6 / 60) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("costs", "budget"), [([7, 5, 9], 4), ([7, 5, 9], 5)])
def test_a_budget_that_keeps_nothing_is_refused(costs, budget):
    config = DynamicDoraConfig(r=4, target_modules=TARGETS, target_params=budget)
    if budget < min(costs):
        with pytest.raises(
            ConfigError, match=r"budget of 4 parameters keeps nothing: the smallest .* has 5 parameters"
        ):
            config.policy(layout(costs=costs), 100)
    else:
        assert config.policy(layout(costs=costs), 100) is not None


@pytest.mark.parametrize(("steps", "warned"), [(30, False), (28, True), (3, True)])
def test_a_window_without_a_pruning_before_its_end_is_said(steps, warned, caplog):
    """Steps 4 to 15 or to 14, with a pruning every 11: one on the way, or none."""
    DynamicDoraConfig(r=4, target_modules=TARGETS, prune_interval=11).policy(layout(), steps)
    assert ("shorter than prune_interval=11: 6 components go at once at its end" in caplog.text) == warned
