"""What a comparison says a run cost: the time of its training alone, and the memory of its training alone."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ranktune.compare import measuring
from ranktune.compare.measuring import CostCallback
from ranktune.recipe import load_recipe
from ranktune.run.display import SilentDisplay
from ranktune.run.trainer import RankTrainerMixin
from ranktune.training import train
from tests.tiny import write_everything

HOUR = 3600.0


@pytest.mark.parametrize("every", ["epoch", "1"])
def test_scoring_on_the_way_is_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str) -> None:
    """Every evaluation takes an hour by the clock, and every optimizer step a hundred seconds."""
    recipe = write_everything(tmp_path)
    passed = [0.0]
    evaluations = []
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + passed[0]))
    evaluate = RankTrainerMixin.evaluate

    def slow(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        passed[0] += HOUR
        evaluations.append(self.state.global_step)
        return evaluate(self, *args, **kwargs)

    class Step(CostCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            passed[0] += 100.0

    monkeypatch.setattr(RankTrainerMixin, "evaluate", slow)
    cost = Step()
    overrides = ("train.epochs=2", f"train.eval_every={every}", f"output={tmp_path / 'out'}")
    metrics = train(load_recipe(recipe, overrides), recipe, SilentDisplay(), callbacks=[cost])
    between = [step for step in evaluations if step > 0]
    assert len(between) >= {"epoch": 2, "1": metrics["steps"]}[every]
    assert 100.0 * metrics["steps"] <= cost.seconds < 100.0 * metrics["steps"] + HOUR / 2


def test_memory_of_a_gpu_is_that_of_training_and_of_nothing_before_or_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that scoring before it took are given back; what is scored afterwards is not in the peak."""
    gpu = {"reserved": 900, "peak": 900}

    def reserve(amount: int) -> None:
        gpu["reserved"] = amount
        gpu["peak"] = max(gpu["peak"], amount)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserve(100))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: gpu.update(peak=gpu["reserved"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: gpu["reserved"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: gpu["peak"])
    cost, state = CostCallback(), TrainerState()
    state.num_input_tokens_seen = 70
    arguments: Any = TrainingArguments
    cost.on_train_begin(arguments, state, TrainerControl())
    for between, after in ((300, 200), (500, 400)):
        reserve(between)
        reserve(after)
        cost.on_step_end(arguments, state, TrainerControl())
    cost.on_train_end(arguments, state, TrainerControl())
    reserve(5000)
    assert cost.kind == "cuda"
    assert cost.tokens == 70
    assert cost.memory() == {
        "accelerator_memory_reserved_avg": 300,
        "accelerator_memory_max": 500,
        "accelerator_memory_reserved_99th": 398,
    }


def test_the_clock_waits_for_a_gpu_before_scoring_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    cost: CostCallback = CostCallback()
    arguments: Any = TrainingArguments
    cost.on_step_end(arguments, TrainerState(), TrainerControl())
    assert not waited  # or every step would wait
    cost.on_step_end(arguments, TrainerState(), TrainerControl(should_evaluate=True))
    assert waited
