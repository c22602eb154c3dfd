"""The controller in any loop: its clock, its refusals, bad gradients, compaction, and resuming."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator

import ranktune
from ranktune import ConfigError, ControllerError, DynamicDoraConfig, IncreLoraConfig, RankConfig, RankController
from ranktune.adapters import updates
from ranktune.optimizer_state import forget_components, keep_components, warn_if_unknown
from ranktune.policy import RankState
from tests.methods import TARGETS, build_base, inputs
from tests.test_dynamic_dora import STEPS, build, optimizer_of, train


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
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert len(first[1]) == len(second[1])
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("stop", [1, 5, 9, 12, 13, 29, 30, 31, 45])
def test_resuming_is_bitwise(stop, tmp_path):
    """Before, at and after prunings, at the final one and after it: weights, averages, masks, moments."""

    def fresh():
        torch.manual_seed(0)
        model = build(lora_dropout=0.2)
        return model, optimizer_of(model)

    def run(model, optimizer, start, end):
        for step in range(start, end):
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            for micro in range(2):
                (model(inputs(seed=2 * step + micro)) - 1.0).square().mean().backward()
            optimizer.step()

    model, optimizer = fresh()
    controller = RankController(model, optimizer, STEPS)
    run(model, optimizer, 0, stop)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, stop, STEPS)
    expected = snapshot(model, optimizer)

    torch.manual_seed(55)
    base = build_base("Linear")
    resumed = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    again = optimizer_of(resumed)
    again.load_state_dict(saved)
    second = RankController(resumed, again, STEPS)
    assert second.step == stop
    run(resumed, again, stop, STEPS)
    assert_same(snapshot(resumed, again), expected)
    assert second.ranks() == controller.ranks()
    assert second.history == [change for change in controller.history if change.step > stop]


def test_state_loaded_after_the_controller_was_made_moves_its_clock():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 20)
    later = copy.deepcopy(model.state_dict())
    other = build()
    optimizer = optimizer_of(other)
    controller = RankController(other, optimizer, STEPS)
    train(other, optimizer, 3)
    other.load_state_dict(later)
    assert controller.step == 20
    train(other, optimizer, 1)
    assert controller.step == 21


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad, caplog):
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 12)
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    (model(inputs()) - 1.0).square().mean().backward()
    model.base_model.model.wide.update_of("default").lora_A.grad[0, 0] = bad
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    assert controller.step == 12
    assert controller.skipped == 1
    assert "base_model.model.wide.ranktune_update.default.lora_A" in caplog.text
    train(model, optimizer, STEPS - 12)
    assert controller.total_rank() == 12


def test_bad_gradients_without_end_stop_the_run_and_name_the_layer():
    model = build()
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)

    def poisoned():
        for _ in range(50):
            optimizer.zero_grad()
            model(inputs()).sum().backward()
            model.base_model.model.narrow.update_of("default").gate.grad[0] = float("nan")
            optimizer.step()

    with pytest.raises(ControllerError, match=r"20 optimizer steps in a row .*narrow.*gate"):
        poisoned()


def test_steps_that_a_scaler_skips_do_not_count():
    """The CPU scaler calls a fused optimizer on overflow too, with a flag instead of skipping."""
    for fused in (False, True):
        model = build()
        optimizer = optimizer_of(model, fused=fused)
        controller = RankController(model, optimizer, STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            optimizer.zero_grad()
            loss = (model(inputs(seed=step)) - 1.0).square().mean()
            scaler.scale(loss * (float("inf") if step in (1, 4) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert controller.step == 4, f"fused={fused}"
        assert controller.skipped == 0, "the scaler skipped, not the controller"


def test_under_a_scaler_the_penalty_is_that_of_full_precision():
    paths = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = build(dem_weight=5.0)
        optimizer = optimizer_of(model, fused=True)
        RankController(model, optimizer, STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale((model(inputs(seed=step)) - 1.0).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        paths.append(snapshot(model, optimizer)[0])
    for name, value in paths[0].items():
        torch.testing.assert_close(value, paths[1][name], rtol=1e-5, atol=1e-6)


def test_accelerates_optimizer_is_unwrapped_and_accumulation_counted():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    controller = RankController(model, optimizer, STEPS)
    for step in range(10):
        with accelerator.accumulate(model):
            accelerator.backward((model(inputs(seed=step)) - 1.0).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == 5


def test_a_controller_that_never_acted_says_so():
    model = build()
    controller = RankController(model, optimizer_of(model), STEPS)
    train(model, optimizer_of(model), 2)
    with pytest.raises(ControllerError, match=r"never saw an optimizer step.*Give RankController the optimizer"):
        controller.finish()


def test_training_without_a_controller_warns_and_says_how_to_fix_it():
    model = build()
    with pytest.warns(UserWarning, match=r"without a controller.*RankCallback.*RankController"):
        model(inputs()).sum().backward()
    with torch.no_grad():
        model(inputs())
    model.eval()(inputs())


def test_a_layer_that_is_not_fused_warns_too():
    """Hooked, quantised and doubly adapted layers take another path, and their ranks stay just as silently."""
    model = build()
    for name, _ in updates(model):
        model.get_submodule(f"base_model.model.{name}.base_layer").register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="without a controller"):
        model(inputs()).sum().backward()
    model.eval()(inputs())


def test_every_model_is_warned_of_once_in_the_same_process():
    """A notebook's second attempt is as silent a failure as its first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for model in (build(), build(), copy.deepcopy(build())):
            for _ in range(2):
                model(inputs()).sum().backward()
    assert len([one for one in caught if "without a controller" in str(one.message)]) == 3


def test_a_second_controller_on_one_optimizer_is_refused():
    model = build()
    optimizer = optimizer_of(model)
    first = RankController(model, optimizer, STEPS)
    with pytest.raises(ConfigError, match=r"has a controller on this optimizer already. Call its close\(\) first"):
        RankController(model, optimizer, STEPS)
    RankController(model, optimizer_of(model), STEPS).close()  # what a cell that is run again does
    first.close()
    assert RankController(model, optimizer, STEPS).step == 0


@pytest.mark.parametrize(("steps", "warned"), [(STEPS // 2 - 1, True), (STEPS // 2, False)])
def test_a_run_that_ended_before_its_ranks_were_final_is_warned_of(steps, warned, caplog):
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, steps)
    controller.finish()
    message = f"the run ended at step {steps} of total_steps={STEPS}, before the ranks of adapter 'default' were final"
    assert (message in caplog.text) == warned
    assert (f"the total rank is {controller.total_rank()}" in caplog.text) == warned


@pytest.mark.parametrize("config", [DynamicDoraConfig, IncreLoraConfig], ids=["prunes", "grows"])
def test_the_total_rank_keeps_to_the_budget_between_its_changes_too(config):
    fields = {"prune_interval": 3} if config is DynamicDoraConfig else {"grow_interval": 4, "top_h": 2, "grow_by": 1}
    model = peft.get_peft_model(build_base("Linear"), config(r=4, lora_alpha=6, target_modules=TARGETS, **fields))
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    start = controller.total_rank()
    train(model, optimizer, STEPS)
    budgets = controller.budgets()
    assert [step for step, _ in budgets] == sorted({step for step, _ in budgets})
    assert budgets[0] == (0, start)
    assert budgets[-1][1] == controller.total_rank() == 12
    assert len(budgets) > 3
    for step in range(STEPS + 1):
        total = start + sum(change.new - change.old for change in controller.history if change.step <= step)
        allowed = [value for at, value in budgets if at <= step][-1]
        before_next_pruning = [value for at, value in budgets if at <= step - 3][-1:] or [start]
        assert total <= (before_next_pruning[0] if config is DynamicDoraConfig else allowed)


def test_the_budgets_of_a_schedule_that_was_begun_anew_begin_there():
    model = build()
    optimizer = optimizer_of(model)
    first = RankController(model, optimizer, STEPS)
    train(model, optimizer, 20)
    first.close()
    second = RankController(model, optimizer, STEPS, restart=True)
    train(model, optimizer, STEPS - 20)
    assert second.budgets()[0] == (20, 18)
    assert second.budgets()[-1] == (max(step for step, _ in second.budgets()), 12)


def test_a_closed_controller_is_no_controller():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 1)
    controller.close()
    with pytest.warns(UserWarning, match="without a controller"):
        model(inputs()).sum().backward()
    optimizer.step()
    assert controller.step == 1


def test_what_cannot_be_controlled_is_refused():
    fixed = peft.get_peft_model(build_base("Linear"), RankConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="'lora', whose ranks do not move"):
        RankController(fixed, optimizer_of(fixed), STEPS)
    with pytest.raises(ConfigError, match="no ranktune adapter: add one"):
        RankController(build_base("Linear"), optimizer_of(fixed), STEPS)
    model = build()
    with pytest.raises(ConfigError, match="no ranktune adapter 'other'"):
        RankController(model, optimizer_of(model), STEPS, adapter_name="other")
    with pytest.raises(ConfigError, match="total_steps=0"):
        RankController(model, optimizer_of(model), 0)
    with pytest.raises(ConfigError, match=r"lora_A of square is in 0 optimizer groups.*parameter_groups"):
        RankController(model, optimizer_of(fixed), STEPS)

    class DeepSpeedOptimizer:
        pass

    with pytest.raises(ConfigError, match="under DeepSpeed"):
        RankController(model, DeepSpeedOptimizer(), STEPS)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_compacting_keeps_the_output_and_training_goes_on_the_same(use_dora, kind, tmp_path):
    torch.manual_seed(0)
    model = build(use_dora=use_dora)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = optimizer_of(model, kind, **options)
    controller = RankController(model, optimizer, STEPS)
    with pytest.raises(ConfigError, match="still being moved"):
        ranktune.compact(model, optimizer)
    train(model, optimizer, 40)
    whole, whole_optimizer = copy.deepcopy((model, optimizer))
    RankController(whole, whole_optimizer, STEPS)
    expected = model.eval()(inputs())
    identities = [id(p) for p in model.parameters()]
    ranks = ranktune.compact(model, optimizer)
    assert ranks == controller.ranks()
    assert sum(ranks.values()) == 12
    assert [id(p) for p in model.parameters()] == identities
    for name, update in updates(model):
        assert update.lora_A.shape[0] == update.lora_B.shape[1] == update.gate.shape[0] == ranks[name]
        for parameter in (update.lora_A, update.lora_B, update.gate):
            for value in optimizer.state[parameter].values():
                assert value.numel() in (1, parameter.numel())
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-6, atol=1e-6)

    train(model.train(), optimizer, 20, seed=40)
    train(whole.train(), whole_optimizer, 20, seed=40)
    torch.testing.assert_close(model.eval()(inputs()), whole.eval()(inputs()), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert ranktune.ranks(loaded) == ranks
        assert torch.equal(loaded.eval()(inputs()), model(inputs()))


def test_a_compacted_adapter_trains_on_without_a_controller_and_without_a_warning():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 30)
    controller.close()
    with pytest.warns(UserWarning, match="without a controller"):
        model(inputs())
    ranktune.compact(model, optimizer)
    model(inputs())


def test_a_module_may_lose_every_component(tmp_path):
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 30)
    with torch.no_grad():
        update = model.base_model.model.wide.update_of("default")
        update.rank_active.zero_()
        update.gate.zero_()
    expected = model.eval()(inputs())
    controller.close()
    assert ranktune.compact(model)["wide"] == 0
    expected_exactly = model(inputs())
    torch.testing.assert_close(expected_exactly, expected, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_base("Linear"), tmp_path)
    assert torch.equal(loaded.eval()(inputs()), expected_exactly)


def test_a_compacted_adapter_is_not_pruned_again():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 30)
    controller.close()
    ranktune.compact(model)
    for _, update in updates(model):
        update.rank_step.zero_()
    with pytest.raises(ConfigError, match="was compacted, and its ranks are final"):
        RankController(model, optimizer, STEPS)


def test_fixed_ranks_are_left_as_they_are_by_compact():
    model = peft.get_peft_model(build_base("Linear"), RankConfig(r=3, target_modules=TARGETS))
    assert ranktune.compact(model) == dict.fromkeys(TARGETS, 3)


def test_two_adapters_and_one_controller():
    model = build()
    model.add_adapter("other", DynamicDoraConfig(r=2, target_modules=["wide"]))
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS, adapter_name="default")
    train(model, optimizer, STEPS)
    assert controller.total_rank() == 12
    assert ranktune.ranks(model, "other") == {"wide": 3}


ADAFACTORS = {
    "transformers": (
        lambda groups: transformers.Adafactor(groups, lr=0.02, relative_step=False, scale_parameter=False),
        ("exp_avg_sq_row", "exp_avg_sq_col"),
    ),
    "torch": (lambda groups: torch.optim.Adafactor(groups, lr=0.02), ("row_var", "col_var")),
}


def adafactor_of(which, model):
    make, names = ADAFACTORS[which]
    optimizer = make(ranktune.parameter_groups(model, lr=0.02, weight_decay=0.0))
    train(model, optimizer, 3)
    update = model.base_model.model.wide.update_of("default")
    indexed = [(update.lora_A, names[0], names[1]), (update.lora_B, names[1], names[0])]
    return optimizer, update, indexed


@pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")
@pytest.mark.parametrize("which", ADAFACTORS)
def test_adafactor_forgets_its_statistic_over_components_and_keeps_the_other(which):
    optimizer, update, indexed = adafactor_of(which, build())
    before = copy.deepcopy([optimizer.state[parameter] for parameter, _, _ in indexed])
    forget_components(optimizer, update, torch.tensor([1, 4]))
    for (parameter, over_components, shared), old in zip(indexed, before, strict=True):
        now = optimizer.state[parameter]
        expected = old[over_components].flatten().clone()
        assert (expected != 0).all()
        expected[[1, 4]] = 0.0
        assert torch.equal(now[over_components].flatten(), expected)
        assert torch.equal(now[shared], old[shared])


@pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")
@pytest.mark.parametrize("kept", [[0, 2, 5], []])
@pytest.mark.parametrize("which", ADAFACTORS)
def test_adafactor_goes_on_with_the_components_that_are_kept(which, kept):
    model = build()
    optimizer, update, indexed = adafactor_of(which, model)
    before = copy.deepcopy([optimizer.state[parameter] for parameter, _, _ in indexed])
    kept = torch.tensor(kept, dtype=torch.int64)
    keep_components(optimizer, update, kept)
    update.keep_components(kept)
    for (parameter, over_components, shared), old in zip(indexed, before, strict=True):
        now = optimizer.state[parameter]
        assert torch.equal(now[over_components].flatten(), old[over_components].flatten()[kept])
        assert now[over_components].ndim == old[over_components].ndim
        assert torch.equal(now[shared], old[shared])
    if len(kept):
        train(model, optimizer, 1)


def test_eight_bit_moments_are_set_to_the_code_of_zero():
    """bitsandbytes keeps codes into a map; zero is not code 0."""
    model = build()
    optimizer = optimizer_of(model)
    update = model.base_model.model.wide.update_of("default")
    codes = torch.randint(0, 256, update.lora_B.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    signed, unsigned = torch.linspace(-1.0, 1.0, 255), torch.linspace(0.0, 1.0, 256)
    optimizer.state[update.lora_B] = {
        "step": 3, "state1": codes.clone(), "state2": codes.clone(), "qmap1": signed, "qmap2": unsigned,
        "absmax1": torch.ones(2), "absmax2": torch.ones(2),
    }  # fmt: skip
    optimizer.state[update.lora_A] = {"step": 3, "state1": torch.ones_like(update.lora_A)}
    forget_components(optimizer, update, torch.tensor([2]))
    for name, zero in (("state1", 127), ("state2", 0)):
        expected = codes.clone()
        expected[:, 2] = zero
        assert torch.equal(optimizer.state[update.lora_B][name], expected)
    assert optimizer.state[update.lora_A]["state1"].sum(1).tolist() == [12.0, 12.0, 0.0, 12.0, 12.0, 12.0]
    warn_if_unknown(optimizer)


def test_state_of_an_unknown_kind_is_reported():
    model = build()
    optimizer = optimizer_of(model)
    optimizer.state[model.base_model.model.wide.update_of("default").lora_A] = {"mystery": torch.ones(6, 12)}
    with pytest.warns(UserWarning, match=r"AdamW keeps state that ranktune does not know \(mystery\)"):
        warn_if_unknown(optimizer)


def test_bad_gradients_now_and_then_do_not_stop_the_run():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    for step in range(33):
        optimizer.zero_grad()
        model(inputs(seed=step)).sum().backward()
        if step != 16:
            model.base_model.model.narrow.update_of("default").gate.grad[0] = float("nan")
        optimizer.step()
    assert (controller.step, controller.skipped) == (1, 32)


def test_the_history_and_the_importance_show_the_averages_of_the_active():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 30)
    importance = controller.importance()
    last = {change.module: change for change in controller.history if change.step == 30}
    assert last
    assert all(change.old != change.new for change in controller.history)
    assert {change.step for change in controller.history} <= {s for s in range(31) if s % 3 == 0 or s == 30}
    for name, update in updates(model):
        pairs = list(zip(update.rank_active.tolist(), update.rank_average.tolist(), strict=True))
        kept = sorted((average for active, average in pairs if active), reverse=True)
        assert importance[name]["kept"] == kept
        assert importance[name]["dropped"] == sorted((a for active, a in pairs if not active), reverse=True)
        if name in last and kept:
            assert last[name].score == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def test_compacting_drops_gradients_of_the_old_shape():
    model = build()
    optimizer = optimizer_of(model)
    RankController(model, optimizer, STEPS)
    train(model, optimizer, 30)
    (model(inputs()) - 1.0).square().mean().backward()
    ranktune.compact(model, optimizer)
    for _, update in updates(model):
        assert all(parameter.grad is None for parameter in (update.lora_A, update.lora_B, update.gate))


def test_a_module_that_lost_every_component_has_no_score_in_the_history():
    model = build()
    optimizer = optimizer_of(model)
    controller = RankController(model, optimizer, STEPS)
    train(model, optimizer, 12)
    kept, average = (
        torch.stack([getattr(u, name) for _, u in updates(model)]) for name in ("rank_active", "rank_average")
    )
    state = RankState(controller.step, kept.clone(), average)
    kept[1] = False
    with torch.no_grad():
        controller._choose(state, kept)
    assert [(change.module, change.new, change.score) for change in controller.history] == [("wide", 0, None)]


@pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")
@pytest.mark.parametrize("which", ADAFACTORS)
def test_adafactor_of_a_single_component_may_lose_it(which):
    optimizer, update, _ = adafactor_of(which, build(r=1, init_r=1))
    keep_components(optimizer, update, torch.tensor([], dtype=torch.int64))
    over_components = {"transformers": "exp_avg_sq_row", "torch": "row_var"}[which]
    assert optimizer.state[update.lora_A][over_components].numel() == 0
