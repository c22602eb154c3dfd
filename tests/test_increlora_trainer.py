"""IncreLoRA in a real `transformers.Trainer`: its own linear schedule, accumulation, resuming from its checkpoints."""

from __future__ import annotations

import pytest
import torch

from ranktune import IncreLoraConfig
from ranktune.row_rates import RowRates
from tests.methods import TARGETS
from tests.test_trainer_callback import build_trainer, callback_of, state_of


def trainer(folder, **arguments):
    """Rounds at t = 4, 6, 8, 10 and 12 of 24 steps."""
    config = IncreLoraConfig(
        r=4, target_modules=TARGETS, grow_interval=2, top_h=1, grow_by=2, score_window=2, lora_dropout=0.1
    )
    return build_trainer(folder, config=config, gradient_accumulation_steps=2, warmup_steps=2, **arguments)


@pytest.mark.parametrize("stop", [4, 8, 12, 16])
def test_resuming_from_a_checkpoint_is_bitwise(tmp_path, stop):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    controller = callback_of(whole).controller
    assert [change.step for change in controller.history] == [4, 6, 8, 10, 12]
    assert controller.total_rank() == 12
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    expected, found = state_of(whole.model), state_of(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    later = [entry["loss"] for entry in whole.state.log_history if "loss" in entry and entry["step"] > stop]
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry and entry["step"] > stop] == later


def test_late_components_follow_the_trainers_linear_schedule(tmp_path, monkeypatch):
    """After its ramp of 2 steps, a component born at t decays to zero over the 24 - (t + 1) - 2 that are left."""
    taken = {}
    of_rows = RowRates.of_rows

    def recording(self, ages):
        taken[self.step] = (self.linear, self.share, ages, of_rows(self, ages))
        return taken[self.step][3]

    monkeypatch.setattr(RowRates, "of_rows", recording)
    trainer(tmp_path).train()
    assert sorted(taken) == list(range(1, 24))
    assert all(linear for linear, _, _, _ in taken.values())
    for step in range(3, 24):
        _, share, ages, rho = taken[step]
        assert share == pytest.approx((24 - step) / 22)
        for age, factor in zip(ages.tolist(), rho.tolist(), strict=True):
            birth = step - age
            own = (age - 1) / 2 if age - 1 < 2 else (24 - step) / (24 - (birth + 1) - 2)
            assert factor * share == pytest.approx(own)
