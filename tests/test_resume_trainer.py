"""Resuming a Trainer whose ranks move: the record is complete, another length is refused or planned anew."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer

import ranktune
from ranktune import ConfigError, DynamicDoraConfig, IncreLoraConfig, RankCallback, RankConfig, RankController
from ranktune.history import Restart
from ranktune.integrations.trainer import RankEarlyStoppingCallback
from ranktune.policy import Layout
from tests.methods import TARGETS
from tests.test_trainer_callback import build_trainer, callback_of, evaluated, state_of

GROWING = {"r": 4, "target_modules": TARGETS, "grow_interval": 2, "top_h": 1, "grow_by": 2, "score_window": 2}
CONFIGS = {
    "dynamic-dora": DynamicDoraConfig(r=4, target_modules=TARGETS, prune_interval=2, lora_dropout=0.1),
    "increlora": IncreLoraConfig(**GROWING, lora_dropout=0.1),
}


def whole(folder, method="dynamic-dora", **arguments):
    """24 steps, 16 an epoch, with a checkpoint after every second."""
    trainer = build_trainer(folder, config=CONFIGS[method], save_strategy="steps", save_steps=2, **arguments)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", CONFIGS)
def test_history_and_importance_are_those_of_the_uninterrupted_run(tmp_path, method):
    expected = callback_of(whole(tmp_path, method)).controller
    steps = {change.step for change in expected.history}
    for stop in (2, 6, 10, 14, 22):
        resumed = build_trainer(tmp_path / "resumed", config=CONFIGS[method])
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        found = callback_of(resumed).controller
        assert found.history == expected.history
        assert found.importance() == expected.importance()
    assert min(steps) <= 10 < max(steps)  # there was something to remember, and something left to do


def test_skipped_steps_are_remembered(tmp_path):
    class Spoilt(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == 1:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.nan)
            return loss

    trainer = build_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.__class__ = Spoilt
    trainer.train()
    assert callback_of(trainer).controller.skipped == 1
    resumed = build_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback_of(resumed).controller.skipped == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_steps": 48}, ["total steps was 24, now 48", "epochs was 2, now 3", "over the 40 steps that remain"]),
        ({"max_steps": 20}, ["total steps was 24, now 20"]),
        ({"gradient_accumulation_steps": 2}, ["accumulation was 1, now 2"]),
        ({"per_device_train_batch_size": 8}, ["batch size was 4, now 8"]),
    ],
)
@pytest.mark.parametrize("method", CONFIGS)
def test_another_length_is_refused_and_nothing_is_trained(tmp_path, method, changed, words):
    whole(tmp_path, method)
    resumed = build_trainer(tmp_path / "resumed", config=CONFIGS[method], **changed)
    with pytest.raises(ConfigError, match=r"checkpoint of step 8 belongs to another run") as refusal:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for word in [*words, "RankCallback(replan=True)"]:
        assert word in str(refusal.value)
    assert resumed.state.global_step == 8


def test_another_number_of_processes_is_refused(tmp_path):
    whole(tmp_path)
    path = tmp_path / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["RankCallback"]["attributes"]["record"]["shape"]["world_size"] = 4
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="world size was 4, now 1"):
        build_trainer(tmp_path / "resumed").train(resume_from_checkpoint=str(path.parent))


def test_fixed_ranks_may_be_trained_longer(tmp_path):
    config = RankConfig(r=2, target_modules=TARGETS)
    build_trainer(tmp_path, config=config, max_steps=4, save_strategy="steps", save_steps=2).train()
    longer = build_trainer(tmp_path / "longer", config=config, max_steps=6)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert longer.state.global_step == 6


def test_a_checkpoint_from_before_the_callback_can_be_resumed(tmp_path):
    config = RankConfig(r=2, target_modules=TARGETS)
    settings = {"config": config, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    build_trainer(tmp_path, callbacks=[], **settings).train()
    later = build_trainer(tmp_path / "later", **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later.state.global_step == 4


def test_a_callback_that_is_used_again_does_not_mix_the_records(tmp_path):
    first = build_trainer(tmp_path)
    first.train()
    callback = callback_of(first)
    history = callback.history
    build_trainer(tmp_path, callbacks=[callback]).train()
    assert callback.history == history


@pytest.mark.parametrize(("stop", "steps"), [(4, 48), (8, 20), (10, 60)])
@pytest.mark.parametrize("method", CONFIGS)
def test_replanning_begins_the_schedule_anew_from_the_present_ranks(tmp_path, method, stop, steps):
    earlier = [change for change in callback_of(whole(tmp_path, method)).controller.history if change.step < stop]
    callback = RankCallback(replan=True)
    trainer = build_trainer(
        tmp_path / "replanned", config=CONFIGS[method], callbacks=[callback], max_steps=steps,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    controller = callback.controller
    assert controller.restart.step == stop
    assert controller.total_rank() == 12
    assert trainer.state.global_step == controller.step == steps
    if method == "dynamic-dora":
        # The earlier history includes what was decided after the step `stop` itself.
        begin, end = controller.policy.schedule.begin, controller.policy.schedule.end
        assert (begin, end) == (round(0.15 * (steps - stop)), steps - stop - round(0.5 * (steps - stop)))
        later = [change.step - stop for change in controller.history if change.step > stop]
        assert all(begin < step <= end for step in later)
    else:
        later = [change.step - stop for change in controller.history if change.step >= stop]
        assert all(step > 2 and step % 2 == 0 for step in later)
    assert [change for change in controller.history if change.step < stop] == earlier
    # A run that was planned anew is itself resumed without a word, and is the same to the bit.
    middle = stop + (steps - stop) // 4 * 2
    again = build_trainer(tmp_path / "again", config=CONFIGS[method], max_steps=steps)
    again.train(resume_from_checkpoint=str(tmp_path / "replanned" / f"checkpoint-{middle}"))
    assert callback_of(again).controller.history == controller.history
    assert callback_of(again).controller.restart == controller.restart
    expected, found = state_of(trainer.model), state_of(again.model)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("method", CONFIGS)
def test_ranks_that_were_final_stay_final_when_replanned(tmp_path, method):
    first = whole(tmp_path, method)
    longer = build_trainer(
        tmp_path / "longer", config=CONFIGS[method], callbacks=[RankCallback(replan=True)], max_steps=40
    )
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    controller = callback_of(longer).controller
    assert controller.ended
    assert longer.state.global_step == 40
    assert ranktune.ranks(longer.model) == ranktune.ranks(first.model)
    assert controller.history == callback_of(first).controller.history
    inactive = [u.gate[~u.rank_active] for _, u in ranktune.adapters.updates(longer.model)]
    assert all(not gates.any() for gates in inactive)


def test_nothing_remains_to_plan(tmp_path):
    whole(tmp_path)
    trainer = build_trainer(tmp_path / "over", callbacks=[RankCallback(replan=True)], max_steps=8)
    with pytest.raises(ConfigError, match="8 steps of it are done: nothing remains"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_raw_loop_can_begin_anew(tmp_path):
    trainer = whole(tmp_path)
    update = next(u for _, u in ranktune.adapters.updates(trainer.model))
    with torch.no_grad():
        for _, one in ranktune.adapters.updates(trainer.model):
            one.rank_step.fill_(8)
            one.rank_active[:] = torch.tensor([True] * 5 + [False])
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad])
    controller = RankController(trainer.model, optimizer, 28, restart=True)
    assert controller.restart == Restart(8, (5, 5, 5))
    assert (controller.policy.schedule.start, controller.policy.schedule.target) == (15, 12)
    assert controller.budget() == 15
    controller.close()
    update.rank_step.fill_(18)
    resumed = RankController(trainer.model, optimizer, 28, restart=controller.restart)
    assert resumed.budget() == 12
    resumed.close()


def test_growth_anew_is_laid_out_from_the_present_ranks():
    layout = Layout(("a", "b"), torch.tensor([10, 20]), (3, 1))
    policy = IncreLoraConfig(r=4, max_r=6, grow_by=2, grow_interval=5, top_h=2).policy(layout, 40)
    assert (policy.start, policy.target) == (4, 8)
    assert policy.budget(0) == 4
    with pytest.raises(ConfigError, match="where 4 components are to be added"):
        IncreLoraConfig(r=4, max_r=6, grow_by=1, grow_interval=5, top_h=1).policy(layout, 15)


def test_the_best_model_of_a_resumed_run_is_within_the_budget(tmp_path):
    """Before the first evaluation within the budget, checkpoint and all earlier ones are out of the running."""
    trainer = evaluated(tmp_path, [RankCallback()])
    trainer.args.eval_steps = 8
    trainer.args.save_steps = 4
    trainer.args.load_best_model_at_end = False
    trainer.train()
    # Pruning ends at step 12; the checkpoint of that step has only the evaluation of step 8 behind it.
    resumed = evaluated(tmp_path / "resumed", [RankCallback()])
    resumed.args.eval_steps, resumed.args.load_best_model_at_end = 8, False
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.state.best_metric == trainer.state.best_metric == 16.0


def test_early_stopping_goes_on_counting(tmp_path):
    def build(folder):
        ranks = RankCallback()
        return evaluated(folder, [RankEarlyStoppingCallback(ranks, patience=2), ranks])

    first = build(tmp_path)
    first.train()
    assert first.state.global_step == 16
    assert first.state.best_global_step == 12
    # The best checkpoint is looked for beside the one that is resumed, wherever the run has moved.
    (tmp_path / "moved").mkdir()
    for step in (12, 16):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / "moved" / f"checkpoint-{step}")
    resumed = build(tmp_path / "moved")
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-12"))
    assert resumed.state.global_step == 16
    assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-12")
