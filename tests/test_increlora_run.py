"""IncreLoRA runs: what moves at which step, growth, resuming, saving, compaction."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

import ranktune
from ranktune import ConfigError, ControllerError, IncreLoraConfig, RankController
from ranktune.growing import UNBORN
from tests.methods import TARGETS, build_base, inputs
from tests.test_increlora import FIRST, LAST, STEPS, averages, build, by_name, layer_of, loss_of, optimizer_of, train


def snapshot(model, optimizer):
    tensors = {name: value.clone() for name, value in model.state_dict().items() if "ranktune_" in name}
    moments = [
        value.clone()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return tensors, moments


def assert_same(first, second):
    assert first[0].keys() == second[0].keys()
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    assert len(first[1]) == len(second[1])
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "use_rslora": True}, {"advance_learning": False}], ids=str)
def test_a_run_grows_to_the_target_and_waiting_components_never_move(kind, fields):
    model = build(**fields)
    fresh = copy.deepcopy(by_name(model))
    # Decay on everything, so that what should not move would.
    optimizer = kind(model.parameters(), lr=0.02, weight_decay=0.1)
    controller = RankController(model, optimizer, STEPS)
    identities = [id(parameter) for parameter in model.parameters()]
    totals = []

    def check(_):
        totals.append(controller.total_rank())
        for name, update in by_name(model).items():
            rank, window = update.rank_now, update.window
            assert rank == update.rank == int(update.rank_active[:rank].sum())
            assert window == (min(rank + 2, 16) if not controller.ended else rank)
            if not controller.ended:
                reserve = 1e-5 if update.reserve_learns else 0.0
                assert torch.equal(update.gate.detach()[rank:window], torch.full((window - rank,), reserve))
                assert torch.equal(update.lora_A[window:], fresh[name].lora_A[window:])
                assert torch.equal(update.lora_B[:, window:], fresh[name].lora_B[:, window:])
                trained = update.trained
                assert torch.equal(update.lora_A[trained:], fresh[name].lora_A[trained:])
            assert (update.gate[window:] == 0).all()
            births = update.rank_birth[0, update.start_rank : update.trained]
            assert bool((births[1:] >= births[:-1]).all())
            assert bool((births > UNBORN).all())

    train(model, optimizer, STEPS, after=check)
    controller.finish()
    assert totals == sorted(totals)
    assert totals[FIRST - 1] == 3
    assert totals[FIRST] == 5
    assert totals[LAST - 1] == 11
    assert totals[LAST] == totals[-1] == controller.total_rank() == ranktune.total_rank(model) == 12
    assert [change.step for change in controller.history] == [10, 15, 20, 25, 30]
    assert all(change.score > 0 for change in controller.history)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "base_layer" in name)


def test_the_reserve_wakes_after_the_first_step_and_hardly_shows():
    model = build()
    base = build_base("Linear")
    optimizer = optimizer_of(model, lr=0.0)
    RankController(model, optimizer, STEPS)
    assert torch.equal(model(inputs()), base(inputs()))
    before = copy.deepcopy(by_name(model))
    train(model, optimizer, 1)
    for name, update in by_name(model).items():
        assert (update.rank, update.window) == (1, 3)
        layer = layer_of(model, name)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        shift = (layer(x) - layer.base_layer(x)).abs().max()
        a, b = before[name].lora_A[1:3].norm(dim=1), before[name].lora_B[:, 1:3].norm(dim=0)
        assert 0 < shift <= 6 * 1e-5 * (a * b).sum() * x.norm(dim=1).max() + 1e-6
        delta = 6 * (update.lora_B[:, :3] * update.gate[:3]) @ update.lora_A[:3]
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


@pytest.mark.parametrize("learns", [True, False])
def test_gradients_reach_the_reserves_vectors_but_not_its_gates(learns):
    model = build(advance_learning=learns, orth_weight=0.1)
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)
    train(model, optimizer, 3)
    before = {name: (u.lora_A.clone(), u.gate.clone()) for name, u in by_name(model).items()}
    train(model, optimizer, 3, seed=3)
    for name, update in by_name(model).items():
        moved = (update.lora_A != before[name][0]).any(1)
        assert moved.tolist() == [True] + [learns] * 2 + [False] * 13
        assert (update.gate != before[name][1]).tolist() == [True] + [False] * 15


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_growing_rescales_unless_the_output_is_to_be_kept(keep, use_rslora):
    model = build(preserve_on_grow=keep, use_rslora=use_rslora)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, FIRST)
    seen = []
    chosen = controller._choose

    def choosing(state, mask):
        before = {name: layer_of(model, name).get_delta_weight("default") for name in TARGETS}
        moments = snapshot(model, optimizer)[1]
        factors = {name: (u.lora_A.clone(), u.lora_B.clone()) for name, u in by_name(model).items()}
        ranks = controller.ranks()
        chosen(state, mask)
        assert all(map(torch.equal, moments, snapshot(model, optimizer)[1])), "growth touches no moment"
        for name, update in by_name(model).items():
            assert torch.equal(update.lora_A, factors[name][0])
            assert torch.equal(update.lora_B, factors[name][1])
            share = 1.0 if keep else (ranks[name] / update.rank) ** (0.5 if use_rslora else 1.0)
            after = layer_of(model, name).get_delta_weight("default")
            torch.testing.assert_close(after, share * before[name], rtol=1e-4, atol=2e-6)
            seen.append(share)

    controller._choose = choosing
    train(model, optimizer, 1, seed=FIRST)
    assert len(seen) == 3
    assert keep == (min(seen) == 1.0)


@pytest.mark.parametrize("stop", [1, 2, 9, 10, 11, 13, 16, 29, 30, 31, 32, 45])
def test_resuming_is_bitwise(stop, tmp_path):
    """Before, at and after rounds, in the middle of ramps, at the last round and after it."""

    def fresh():
        model = build(lora_dropout=0.2, use_dora=True, score_window=3)
        optimizer = optimizer_of(model)
        return model, optimizer, get_linear_schedule_with_warmup(optimizer, 4, STEPS)

    def run(model, optimizer, scheduler, start, end):
        for step in range(start, end):
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            for micro in range(2):
                loss_of(model, 2 * step + micro).backward()
            optimizer.step()
            scheduler.step()

    model, optimizer, scheduler = fresh()
    controller = RankController(model, optimizer, STEPS)
    run(model, optimizer, scheduler, 0, stop)
    model.save_pretrained(tmp_path)
    saved, schedule = copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
    run(model, optimizer, scheduler, stop, STEPS)
    expected = snapshot(model, optimizer)

    torch.manual_seed(55)
    resumed = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path, is_trainable=True)
    again = optimizer_of(resumed)
    following = get_linear_schedule_with_warmup(again, 4, STEPS)
    again.load_state_dict(saved)
    following.load_state_dict(schedule)
    second = RankController(resumed, again, STEPS)
    assert second.step == stop
    run(resumed, again, following, stop, STEPS)
    assert_same(snapshot(resumed, again), expected)
    assert second.ranks() == controller.ranks()
    assert second.history == [change for change in controller.history if change.step >= stop]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, FIRST)
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    layer_of(model, "wide").update_of("default").lora_A.grad[0, 0] = bad
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    assert (controller.step, controller.skipped) == (FIRST, 1)
    train(model, optimizer, STEPS - FIRST)
    assert controller.total_rank() == 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_score_is_left_out_and_growth_goes_on(bad, caplog):
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = averages(model)
        if step in (8, 10, 21):
            by_name(model)["wide"].score.grad.fill_(bad)
        optimizer.step()
        if step in (8, 10, 21):
            assert torch.equal(averages(model), before)
            assert "the score of wide is not finite" in caplog.text
    assert torch.isfinite(averages(model)).all()
    assert [change.step for change in controller.history] == [10, 15, 20, 25, 30]
    assert controller.total_rank() == 12


def test_bad_scores_without_end_stop_the_run():
    model = build(score_window="all", warmup_ratio=0.5)
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)

    def poisoned():
        for step in range(30):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            by_name(model)["narrow"].score.grad.fill_(float("nan"))
            optimizer.step()

    with pytest.raises(ControllerError, match=r"20 times in a row a module's score .* first that of narrow"):
        poisoned()


@pytest.mark.parametrize("use_dora", [False, True])
def test_compacting_keeps_the_output_and_training_goes_on_the_same(use_dora, tmp_path):
    model = build(use_dora=use_dora)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 20)
    with pytest.raises(ConfigError, match="still being moved"):
        ranktune.compact(model, optimizer)
    train(model, optimizer, 20, seed=20)
    whole, whole_optimizer = copy.deepcopy((model, optimizer))
    RankController(whole, whole_optimizer, STEPS)
    expected = model.eval()(inputs())
    ranks = ranktune.compact(model, optimizer)
    assert ranks == controller.ranks()
    assert sum(ranks.values()) == 12
    for name, update in by_name(model).items():
        assert update.lora_A.shape[0] == update.lora_B.shape[1] == update.rank_birth.shape[1] == ranks[name]
        assert (update.rank_now, update.window) == (ranks[name], ranks[name])
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-6, atol=1e-6)

    train(model.train(), optimizer, 10, seed=40)
    train(whole.train(), whole_optimizer, 10, seed=40)
    torch.testing.assert_close(model.eval()(inputs()), whole.eval()(inputs()), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert ranktune.ranks(loaded) == ranks
        assert torch.equal(loaded.eval()(inputs()), model(inputs()))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", [0, 1, 12, 40])
def test_a_model_in_the_middle_of_growth_saves_and_loads(stop, tmp_path):
    model = build()
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)
    train(model, optimizer, stop)
    expected = model.eval()(inputs())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded.eval()(inputs()), expected)
        assert ranktune.ranks(loaded) == ranktune.ranks(model)


def test_a_checkpoint_loaded_under_a_controller_moves_it():
    model = build()
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)
    train(model, optimizer, 35)
    later = copy.deepcopy(model.state_dict())
    other = build()
    optimizer = optimizer_of(other)
    controller = RankController(other, optimizer, STEPS)
    train(other, optimizer, 3)
    other.load_state_dict(later)
    assert controller.step == 35
    assert controller.ended
    train(other, optimizer, 1)
    assert controller.total_rank() == 12
    assert all(update.score is None for update in by_name(other).values())


def test_a_target_of_the_start_rank_has_nothing_to_grow():
    model = build(r=2, init_r=2)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    assert controller.ended
    train(model, optimizer, 3)
    controller.finish()
    assert controller.history == []
    assert {update.window for update in by_name(model).values()} == {2}


def test_the_decomposed_magnitude_is_never_reset():
    model = build(use_dora=True)
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    chosen, seen = controller._choose, []

    def choosing(state, mask):
        before = [update.lora_magnitude_vector.clone() for update in by_name(model).values()]
        chosen(state, mask)
        seen.append(all(map(torch.equal, before, (u.lora_magnitude_vector for u in by_name(model).values()))))

    controller._choose = choosing
    train(model, optimizer, STEPS)
    assert seen == [True] * 5


def test_importance_is_that_of_the_modules():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, STEPS)
    ranktune.compact(model, optimizer)
    for name, update in by_name(model).items():
        product = float(update.rank_average[0] * update.rank_average[1])
        assert controller.importance()[name] == {"kept": [pytest.approx(product)], "dropped": []}


def test_by_default_the_config_alone_is_enough():
    torch.manual_seed(0)
    model = peft.get_peft_model(build_base("Linear"), IncreLoraConfig(r=4, target_modules=TARGETS))
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, 100)
    train(model, optimizer, 100)
    controller.finish()
    assert controller.total_rank() == 12
    assert controller.history[-1].step <= 50
