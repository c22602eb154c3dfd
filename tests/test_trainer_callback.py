"""`RankCallback` in a real `transformers.Trainer`: the schedule from the trainer, logs, accumulation, resuming."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import ranktune
from ranktune import ConfigError, ControllerError, DynamicDoraConfig, RankCallback, RankConfig
from ranktune.integrations.trainer import RankEarlyStoppingCallback
from tests.methods import TARGETS, build_base


class Regression(nn.Module):
    """A base model that returns its loss the way Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = build_base("Linear")

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.layers(x)
        return {"loss": (output - labels).square().mean(), "logits": output}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(12, generator=generator)
        return {"x": x, "labels": x[:3].sin()}


def build_trainer(folder, config=None, callbacks=None, eval_dataset=None, **arguments):
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": TARGETS, "prune_interval": 2, "lora_dropout": 0.1}
    model = peft.get_peft_model(Regression(), config or DynamicDoraConfig(**fields))
    settings = {
        "output_dir": str(folder),
        "max_steps": 24,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
        **arguments,
    }
    callbacks = [RankCallback()] if callbacks is None else callbacks
    training = TrainingArguments(**settings)
    return Trainer(model=model, args=training, train_dataset=Rows(), eval_dataset=eval_dataset, callbacks=callbacks)


def callback_of(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RankCallback))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "ranktune_" in name}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_budget_is_met_on_the_trainers_own_clock(tmp_path, accumulation):
    trainer = build_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    controller = callback_of(trainer).controller
    assert controller.total_steps == 24
    assert controller.step == trainer.state.global_step == 24
    assert ranktune.total_rank(trainer.model) == 12
    assert controller.history[-1].step == 12
    logged = [
        (entry["step"], entry["total_rank"], entry["rank_budget"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    assert [step for step, _, _ in logged] == [4, 8, 12, 16, 20, 24]
    assert logged[0][1:] == (18, 18)
    assert all(rank == 12 and budget == 12 for step, rank, budget in logged if step >= 12)


def test_other_callbacks_see_the_rank_in_the_logs(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):  # noqa: ARG002
            if "loss" in logs:
                seen.append(logs["total_rank"])

    build_trainer(tmp_path, callbacks=[RankCallback(), Tracker()]).train()
    assert seen[0] == 18
    assert seen[-1] == 12


@pytest.mark.parametrize("stop", [4, 8, 12, 16])
def test_resuming_from_a_checkpoint_is_bitwise(tmp_path, stop):
    whole = build_trainer(tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = build_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    expected, found = state_of(whole.model), state_of(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    later = [entry["loss"] for entry in whole.state.log_history if "loss" in entry and entry["step"] > stop]
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry and entry["step"] > stop] == later


def test_fixed_ranks_need_no_controller(tmp_path):
    trainer = build_trainer(tmp_path, config=RankConfig(r=2, target_modules=TARGETS), max_steps=2)
    trainer.train()
    assert callback_of(trainer).controller is None


def test_a_trainer_without_the_callback_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"callbacks=\[ranktune.RankCallback\(\)\]"):
        build_trainer(tmp_path, callbacks=[], max_steps=2).train()


def test_a_run_too_short_for_its_schedule_is_refused_before_it_starts(tmp_path):
    config = DynamicDoraConfig(r=4, target_modules=TARGETS, warmup_ratio=0.45)
    with pytest.raises(ConfigError, match="total_steps=2 is too short"):
        build_trainer(tmp_path, config=config, max_steps=2).train()


def test_an_optimizer_that_is_never_stepped_is_an_error_at_the_end(tmp_path):
    class Idle(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: ARG002
            return torch.zeros(())

    trainer = build_trainer(tmp_path, max_steps=2)
    trainer.__class__ = Idle
    callback = callback_of(trainer)
    trainer.create_optimizer()
    trainer.optimizer.step = lambda *_, **__: None
    with pytest.raises(ControllerError, match="never saw an optimizer step"):
        trainer.train()
    assert callback.controller is not None


class EverWorse(Trainer):
    """A trainer whose metric is worse at every evaluation, so that the first that counts is the best."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = float(self.state.global_step)
        return output


def evaluated(folder, callbacks):
    trainer = build_trainer(
        folder, callbacks=callbacks, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        metric_for_best_model="eval_loss", greater_is_better=False, load_best_model_at_end=True,
        eval_dataset=torch.utils.data.Subset(Rows(), range(4)),
    )  # fmt: skip
    trainer.__class__ = EverWorse
    return trainer


def test_only_models_within_the_budget_compete_for_the_best(tmp_path):
    trainer = evaluated(tmp_path, [RankCallback()])
    trainer.train()
    assert trainer.state.best_global_step == 12
    assert trainer.state.best_metric == 12.0
    assert ranktune.total_rank(trainer.model) == 12


def test_early_stopping_waits_until_ranks_are_final(tmp_path):
    ranks = RankCallback()
    trainer = evaluated(tmp_path, [RankEarlyStoppingCallback(ranks, patience=1), ranks])
    trainer.train()
    assert trainer.state.global_step == 12
    assert ranktune.total_rank(trainer.model) == 12


def test_evaluations_are_logged_as_they_are_and_an_earlier_tracker_can_be_overtaken(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):  # noqa: ARG002
            seen.append(dict(logs))

    ranks = RankCallback()
    trainer = evaluated(tmp_path, [Tracker(), ranks])
    ranks.put_first(trainer)
    trainer.train()
    assert [logs["total_rank"] for logs in seen if "loss" in logs][::5] == [18, 12]
    assert not [logs for logs in seen if "eval_loss" in logs and "total_rank" in logs]


def test_the_callbacks_options_reach_the_controller(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=[RankCallback("other", penalty_in_loss=True)], max_steps=8)
    trainer.model.add_adapter("other", DynamicDoraConfig(r=2, target_modules=["layers.wide"], prune_interval=1))
    trainer.model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="adapter 'default' is being trained without a controller"):
        trainer.train()
    controller = callback_of(trainer).controller
    assert controller.adapter_name == "other"
    assert controller.penalty_in_loss
