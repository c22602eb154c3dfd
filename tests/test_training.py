"""Training runs: the same numbers again, arguments that reach the trainer, and results that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, Trainer

import ranktune
from ranktune.errors import RecipeError
from ranktune.evaluation import evaluate
from ranktune.recipe import load_recipe
from ranktune.run import atomic
from ranktune.run.directory import RunDirectory
from ranktune.run.display import PlainDisplay, SilentDisplay, clock
from ranktune.run.events import EventLog, scores_only
from ranktune.training import train
from tests.tiny import write_everything


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("run"))


def run(recipe: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return train(load_recipe(recipe, [*overrides, f"output={out}"]), recipe, SilentDisplay())


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "adapter" / "adapter_model.safetensors")


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunDirectory(out).read_events() if event["event"] == kind]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Every Trainer whose training begins, to look into afterwards."""
    seen: list[Trainer] = []
    begin = Trainer.train

    def spy(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", spy)
    return seen


def test_seed_decides_every_number(recipe: Path, tmp_path: Path) -> None:
    first, second, other = (
        run(recipe, tmp_path / name, f"train.seed={seed}", "method.lora_dropout=0.1")
        for name, seed in (("first", 3), ("second", 3), ("other", 4))
    )
    assert first["scores"] == second["scores"]
    assert events(tmp_path / "first", "step") == events(tmp_path / "second", "step")
    assert first["scores"] != other["scores"]


def test_training_does_not_depend_on_how_often_it_is_scored(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "often", "train.eval_every=2", "method.lora_dropout=0.1")
    run(recipe, tmp_path / "once", "train.eval_every=never", "method.lora_dropout=0.1")
    often, once = adapter(tmp_path / "often"), adapter(tmp_path / "once")
    assert [event["step"] for event in events(tmp_path / "often", "evaluation")] == [0, 2, 4, 6]
    assert [event["step"] for event in events(tmp_path / "once", "evaluation")] == [0, 6]
    assert all(torch.equal(often[name], once[name]) for name in often.keys() | once.keys())


def test_the_adapter_loads_with_peft_and_gives_the_recorded_score(recipe: Path, tmp_path: Path) -> None:
    metrics = run(recipe, tmp_path / "out", "method.name=dora", "train.epochs=3")
    folder = recipe.parent
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    assert ranktune.ranks(model) == json.loads((tmp_path / "out" / "ranks.json").read_text())["final"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [line.rsplit(",", 1) for line in (folder / "data" / "validation.csv").read_text().splitlines()[1:]]
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**batch).logits.argmax(-1)
    names = ["animal", "colour"]
    hits = sum(names[index] == label for index, (_, label) in zip(chosen.tolist(), rows, strict=True))
    assert metrics["after"] == hits / len(rows)
    assert metrics["after"] > metrics["before"]


def test_optimizer_has_ranktunes_groups(recipe: Path, tmp_path: Path, trainers: list[Trainer]) -> None:
    run(recipe, tmp_path / "out", "method.name=dora", "train.weight_decay=0.1", "train.trainer.adam_beta2=0.95")
    trainer = trainers[0]
    groups = trainer.optimizer.optimizer.param_groups  # under accelerate's wrapper
    expected = ranktune.parameter_groups(trainer.model, 0.02, 0.1)
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(p) for p in group["params"]] for group in expected
    ]
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in expected] == [0.1, 0.0]
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in groups)


def test_arguments_reach_the_trainer(recipe: Path, tmp_path: Path, trainers: list[Trainer]) -> None:
    metrics = run(
        recipe,
        tmp_path / "out",
        "train.precision=bf16",
        "train.gradient_accumulation=3",
        "train.gradient_checkpointing=true",
        "train.lr_scheduler=cosine",
        "train.optimizer=adafactor",
        "train.warmup_ratio=0.5",
        "train.save_every=1",
        "train.save_total_limit=1",
        "train.trainer.label_smoothing_factor=0.1",
    )
    args = trainers[0].args
    assert (args.bf16, args.gradient_accumulation_steps, args.label_smoothing_factor) == (True, 3, 0.1)
    assert args.gradient_checkpointing
    assert type(trainers[0].optimizer.optimizer).__name__ == "Adafactor"
    assert args.get_warmup_steps(2) == 1
    assert metrics["steps"] == 2  # 96 examples in batches of 16, three batches a step
    assert [item.name for item in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_gradient_accumulation_is_a_larger_batch(recipe: Path, tmp_path: Path) -> None:
    # SGD: Adam's first steps have the size of the rate whatever the gradient, so rounding would decide them.
    for name, overrides in {
        "whole": ["train.batch_size=32"],
        "parts": ["train.batch_size=8", "train.gradient_accumulation=4"],
        "checkpointed": ["train.batch_size=32", "train.gradient_checkpointing=true"],
    }.items():
        run(recipe, tmp_path / name, "train.optimizer=sgd", "train.learning_rate=1.0", *overrides)
    whole = adapter(tmp_path / "whole")
    assert max(tensor.abs().max() for name, tensor in whole.items() if "lora_B" in name) > 1e-3  # it did move
    for name in ("parts", "checkpointed"):
        for key, tensor in adapter(tmp_path / name).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-4, atol=1e-6)
        for step, expected in zip(events(tmp_path / name, "step"), events(tmp_path / "whole", "step"), strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_early_stopping_returns_to_the_best_checkpoint(recipe: Path, tmp_path: Path) -> None:
    # A rate that ruins the model after a good start, so that the best score is not the last one.
    metrics = run(
        recipe, tmp_path / "out", "train.epochs=40", "train.eval_every=3", "train.early_stopping_patience=3",
        "train.learning_rate=0.3", "train.lr_scheduler=constant", "train.max_grad_norm=0", "train.warmup_ratio=0.0",
    )  # fmt: skip
    scores = [event["accuracy"] for event in events(tmp_path / "out", "evaluation")]
    assert metrics["steps"] < 240
    assert metrics["after"] == max(scores[1:])
    again = evaluate(tmp_path / "out", SilentDisplay())
    assert again.value == metrics["after"]
    assert again.scores == metrics["scores"]["after"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=dora", "train.precision=bf16", "train.base_dtype=bf16"],
        ["method.modules_to_save=[pooler]", "train.precision=bf16", "train.base_dtype=bf16"],
        ["method.target_modules=[query, value]", "method.use_rslora=true", "train.batch_size=7"],
    ],
)
def test_evaluate_is_exact(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    metrics = run(recipe, tmp_path / "out", "train.epochs=2", *overrides)
    result = evaluate(tmp_path / "out", SilentDisplay())
    assert result.same_data
    assert result.scores == metrics["scores"]["after"]
    assert result.recorded == result.scores
    assert result.value == metrics["after"]


def test_a_half_precision_base_trains_in_float32(recipe: Path, tmp_path: Path, trainers: list[Trainer]) -> None:
    run(recipe, tmp_path / "out", "train.precision=bf16", "train.base_dtype=bf16")
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in trainers[0].model.parameters()}
    assert (True, torch.float32) in dtypes
    assert (True, torch.bfloat16) not in dtypes
    assert (False, torch.bfloat16) in dtypes


def test_a_crash_leaves_no_metrics(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("ranktune.run.result.draw_run", fail)
    with pytest.raises(OSError, match="no space"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert (tmp_path / "out" / "recipe.yaml").exists()
    with pytest.raises(RecipeError, match="did not finish"):
        evaluate(tmp_path / "out", SilentDisplay())


def test_recipe_text_is_written_before_training(recipe: Path, tmp_path: Path, trainers: list[Trainer]) -> None:  # noqa: ARG001
    run(recipe, tmp_path / "out", "train.learning_rate=1e-3")
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["train"]["learning_rate"] == 1e-3
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == load_recipe(
        recipe, ["train.learning_rate=1e-3", f"output={tmp_path / 'out'}"]
    )


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    atomic.write_json(path, {"score": 1.0, "loss": float("nan"), "nested": [float("inf"), {"x": 2}]})
    assert json.loads(path.read_text()) == {"score": 1.0, "loss": None, "nested": [None, {"x": 2}]}
    assert path.stat().st_mode & 0o044

    def torn(*_: object) -> None:
        raise OSError("torn")

    monkeypatch.setattr(atomic.os, "fsync", torn)
    with pytest.raises(OSError, match="torn"):
        atomic.write_text(path, "half")
    with pytest.raises(OSError, match="torn"):
        atomic.write_folder(tmp_path / "adapter", lambda folder: (folder / "file").write_text("half"))
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads(path.read_text())["score"] == 1.0


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        assert not (tmp_path / "adapter").exists()
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("whole")

    atomic.write_folder(tmp_path / "adapter", fill)
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "inner" / "file").read_text() == "whole"


def test_the_log_survives_a_torn_last_line(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with EventLog(directory.log) as log:
        log.write("step", step=1, loss=float("inf"))
    with directory.log.open("a") as file:
        file.write('{"event": "st')
    assert directory.read_events() == [{"event": "step", "step": 1, "loss": None}]
    with directory.log.open("a") as file:
        file.write('ep"\n{"event": "end"}\n')
    with pytest.raises(RecipeError, match="line 2 is not JSON"):
        directory.read_events()


def test_scores_are_without_prefix_and_speeds() -> None:
    metrics = {"eval_accuracy": 0.5, "eval_loss": 1.0, "eval_runtime": 3.0, "eval_steps_per_second": 1.0, "epoch": 1.0}
    assert scores_only(metrics) == {"accuracy": 0.5, "loss": 1.0}


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(RecipeError, match="output: "):
            RunDirectory(place).refuse_unless_writable(overwrite=True)


def test_plain_lines_come_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from ranktune.run.display import Pace

    display = PlainDisplay(Console())
    for step in range(101):
        display.pace(Pace(step=step, total=100, loss=0.5, logged=step, rank=12, speed=1234.5))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(10, 101, 10)]
    assert "loss 0.5000  rank 12  1,234 samples/s" in lines[0]
    assert [clock(seconds) for seconds in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]


def test_a_loss_is_shown_at_the_step_it_is_of() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ranktune.run.display import DisplayCallback

    shown: list[str] = []

    class Recorder(SilentDisplay):
        def pace(self, pace: Any) -> None:
            shown.append(f"{pace.step}: {pace.words().split('  ')[0]}")

    args, model = TrainingArguments(output_dir="unused", report_to=[]), torch.nn.Linear(2, 2)
    state = TrainerState(
        max_steps=9, global_step=2, log_history=[{"loss": 4.0, "step": 1}, {"eval_loss": 3.0, "step": 2}]
    )
    callback = DisplayCallback(Recorder(), None)
    callback.on_train_begin(args, state, TrainerControl(), model=model)
    for step, logged in ((3, False), (4, True), (5, False)):
        state.global_step = step
        callback.on_step_begin(args, state, TrainerControl())
        callback.on_step_end(args, state, TrainerControl(should_log=logged))
        if logged:
            callback.on_log(args, state, TrainerControl(), logs={"loss": 2.0}, model=model)
    assert shown == [
        "2: loss 4.0000 at step 1",
        "3: loss 4.0000 at step 1",
        "4: loss 2.0000",
        "5: loss 2.0000 at step 4",
    ]


@pytest.mark.parametrize("method", ["increlora", "dynamic-dora", "full"])
def test_the_rank_that_is_shown_is_that_of_the_step(recipe: Path, tmp_path: Path, method: str) -> None:
    """Also between two logs, of which the loss is: as the model has it after every single step."""
    from transformers import TrainerCallback

    from ranktune.run.display import Pace

    shown, real = {}, {}

    class Recorder(SilentDisplay):
        def pace(self, pace: Pace) -> None:
            shown[pace.step] = pace.words()

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            real[state.global_step] = sum(ranktune.ranks(model).values())

    fields = {
        "increlora": "{name: increlora, r: 3, grow_interval: 2, top_h: 3}",
        "dynamic-dora": "{name: dynamic-dora, r: 2, prune_interval: 2}",
        "full": "full",
    }[method]
    overrides = [f"method={fields}", f"output={tmp_path / 'out'}", "train.epochs=4", "train.logging_steps=7"]
    overrides += ["train.learning_rate=1e-4", "train.eval_every=never", "train.save_every=never"]
    train(load_recipe(recipe, overrides), recipe, Recorder(), callbacks=[Looking()])
    assert set(shown) >= set(range(25))
    if method == "full":
        assert not any("rank" in words for words in shown.values())
        return
    assert len(set(real.values())) > 3
    assert {step: words for step, words in shown.items() if step and f"rank {real[step]}" not in words} == {}
    assert any("at step" in words for words in shown.values())
