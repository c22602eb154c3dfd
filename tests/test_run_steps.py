"""The length of a run, known before there is a Trainer, and rank budgets that are refused by it before weights load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from ranktune.cli import app
from ranktune.run.steps import ExpectedSteps
from tests.tiny import write_everything


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(1) + index}


@pytest.mark.parametrize("examples", [8, 15, 16, 17, 96, 100])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_epochs": 1},
        {"num_train_epochs": 2.5},
        {"num_train_epochs": 3, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 4, "dataloader_drop_last": True},
        {"num_train_epochs": 0.3},
        {"num_train_epochs": 2, "max_steps": 11},
    ],
)
def test_it_is_what_trainer_counts(tmp_path: Path, examples: int, fields: dict) -> None:
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True, **fields
    )
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=Rows(examples))
    counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    expected = ExpectedSteps.of(args, examples)
    assert (expected.epochs, expected.total) == (counted[0], counted[-1])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("examples", [16, 17, 40, 41, 50])
def test_processes_share_the_batches(examples: int, drop_last: bool) -> None:
    batches = BatchSampler(SequentialSampler(range(examples)), 4, drop_last)
    shard = BatchSamplerShard(batches, num_processes=3, process_index=2, even_batches=True)
    args = SimpleNamespace(
        dataloader_drop_last=drop_last, train_batch_size=4, world_size=3, gradient_accumulation_steps=1,
        max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    expected = ExpectedSteps.of(args, examples)
    assert expected.total == max(1, len(shard))
    assert "on 3 processes" in expected.arithmetic


IMPOSSIBLE = [
    (
        ["method={name: dynamic-dora, r: 2, warmup_ratio: 0.45}", "train.epochs=0.3"],
        ["total_steps=2 is too short to"],
    ),
    (["method={name: increlora, r: 4}"], ["total_steps=6 is too short to grow in: 0 rounds", "6 optimizer steps"]),
    (
        ["method={name: increlora, r: 4}", "train.gradient_accumulation=4", "train.epochs=2"],
        [
            "total_steps=4 is",
            "The run has 4 optimizer steps (96 examples in batches of 16, 4 batches a step: 2 steps an",
        ],
    ),
    (["method={name: increlora, r: 4}", "train.max_steps=5"], ["total_steps=5 is", "(train.max_steps=5)"]),
    (["method={name: increlora, r: 4, target_params: 9999999}"], ["above what there is room for: 13 modules x"]),
    (["method={name: dynamic-dora, r: 4, target_params: 9999999}"], ["is above the start: 13 modules x 6"]),
]


@pytest.mark.parametrize(("overrides", "words"), IMPOSSIBLE)
def test_an_impossible_budget_is_refused_before_the_weights_are_read(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    recipe = write_everything(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()  # reading it would be another error
    messages = []
    for dry_run in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["train", str(recipe), *overrides, *dry_run])
        assert result.exit_code == 2, result.output
        messages.append(result.stderr)
        assert not (tmp_path / "out").exists()
    assert messages[0] == messages[1]
    for word in [*words, "section 'method'"]:
        assert word in messages[0]


def test_a_possible_budget_passes_a_dry_run(tmp_path: Path) -> None:
    recipe = write_everything(tmp_path)
    result = CliRunner().invoke(app, ["train", str(recipe), "method={name: dynamic-dora, r: 2}", "--dry-run"])
    assert result.exit_code == 0, result.output
