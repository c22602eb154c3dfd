"""Baselines in `ranktune train`: stock PEFT through our training path, AdaLoRA's allocation at the right moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from transformers import AutoModelForSequenceClassification, Trainer

from ranktune.baselines import PeftAdaLora
from ranktune.errors import ConfigError, RecipeError
from ranktune.evaluation import evaluate
from ranktune.recipe import load_recipe
from ranktune.run.directory import RunDirectory
from ranktune.run.display import SilentDisplay
from ranktune.training import rehearse, train
from tests.tiny import LINEAR_MODULES, WIDTH, write_everything

STOCK = ("peft-lora", "peft-dora", "peft-adalora", "full")
# Of rank r: 2 layers of (4 square, 2 of 16 x 32) and the pooler.
COMPONENTS = 2 * (4 * 2 * WIDTH + 2 * 3 * WIDTH) + 2 * WIDTH
ROWS = 2 * (4 * WIDTH + 3 * WIDTH) + WIDTH
HEAD = 2 * WIDTH + 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("run"))


def method(name: str, **fields: Any) -> str:
    """An override that replaces the whole method section."""
    fields = {} if name == "full" else {"r": 2, "lora_alpha": 4, **fields}
    return "method=" + json.dumps({"name": name, **fields})


def run(recipe: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return train(load_recipe(recipe, [*overrides, f"output={out}"]), recipe, SilentDisplay())


@pytest.mark.parametrize("name", STOCK)
def test_a_baseline_leaves_the_same_record_and_is_scored_again_exactly(name: str, recipe: Path, tmp_path: Path) -> None:
    metrics = run(recipe, tmp_path / "out", method(name), "train.epochs=4")
    ours = run(recipe, tmp_path / "ours", "train.epochs=1")
    assert metrics.keys() == ours.keys()
    assert metrics["method"] == name
    assert metrics["after"] > metrics["before"]
    result = evaluate(tmp_path / "out", SilentDisplay())
    assert result.same_data
    assert result.scores == metrics["scores"]["after"]


def test_parameters_are_counted_exactly(recipe: Path, tmp_path: Path) -> None:
    expected = {
        "lora": (2 * COMPONENTS, 2 * LINEAR_MODULES),
        "peft-lora": (2 * COMPONENTS, 2 * LINEAR_MODULES),
        "peft-dora": (2 * COMPONENTS + ROWS, 2 * LINEAR_MODULES),
    }
    for name, (adapter, rank) in expected.items():
        metrics = run(recipe, tmp_path / name, method(name), "train.max_steps=1")
        counts = [metrics[key] for key in ("active_params", "trainable_params", "training_params", "total_rank")]
        assert counts == [adapter, adapter + HEAD, adapter + HEAD, rank], name
        plan = rehearse(load_recipe(recipe, [method(name)]), recipe)
        assert (plan.adapter, plan.other, plan.total) == (adapter, HEAD, metrics["total_params"])


def test_full_fine_tuning_trains_every_weight(recipe: Path, tmp_path: Path) -> None:
    metrics = run(recipe, tmp_path / "out", method("full"), "train.epochs=2")
    before = AutoModelForSequenceClassification.from_pretrained(recipe.parent / "model", num_labels=2)
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "adapter")
    moved = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        assert not torch.equal(parameter, moved[name]), name
    total = sum(parameter.numel() for parameter in before.parameters())
    assert [metrics[key] for key in ("trainable_params", "training_params", "total_params", "active_params")] == [
        total
    ] * 4
    assert metrics["total_rank"] == 0
    assert json.loads((tmp_path / "out" / "ranks.json").read_text()) == {"final": {}, "history": []}
    assert not (tmp_path / "out" / "ranks.png").exists()


def test_full_fine_tuning_refuses_a_half_precision_base(recipe: Path) -> None:
    loaded = load_recipe(recipe, [method("full"), "train.precision=bf16", "train.base_dtype=bf16"])
    with pytest.raises(RecipeError, match=r"train\.base_dtype is 'bf16'.*method 'full'"):
        rehearse(loaded, recipe)


def test_stock_lora_trains_as_a_hand_written_loop_with_peft(recipe: Path, tmp_path: Path) -> None:
    """One SGD step of the run equals one step written out with PEFT alone."""
    run(
        recipe, tmp_path / "out", method("peft-lora"), "train.max_steps=1", "train.optimizer=sgd",
        "train.learning_rate=0.5", "train.warmup_ratio=0.0", "train.max_grad_norm=0", "train.batch_size=96",
    )  # fmt: skip
    import peft
    from transformers import AutoTokenizer, set_seed

    folder = recipe.parent
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    set_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    rows = [line.rsplit(",", 1) for line in (folder / "data" / "train.csv").read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    batch = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    labels = torch.tensor([["animal", "colour"].index(label) for _, label in rows])
    model(**batch, labels=labels).loss.backward()
    trained = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2),
        str(tmp_path / "out/adapter"),
    )
    after = dict(trained.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = parameter - 0.5 * parameter.grad
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_adalora_is_allocated_once_a_step_with_the_whole_gradient(
    accumulation: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    sizes: list[float] = []
    schedules: list[tuple[int, int, int, int]] = []
    original = AdaLoraModel.update_and_allocate
    batches = [0]
    step = Trainer.training_step

    def count(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        batches[0] += 1
        return step(self, *args, **kwargs)

    def spy(self: AdaLoraModel, global_step: int) -> None:
        assert batches[0] == accumulation  # all micro-batches of this step are in the gradients, and only they
        batches[0] = 0
        gradients = [p.grad for name, p in self.named_parameters() if "lora_" in name and p.requires_grad]
        assert all(gradient is not None for gradient in gradients)
        sizes.append(sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None))
        config = self.rankallocator.peft_config
        schedules.append((config.total_step, config.tinit, config.tfinal, config.deltaT))
        seen.append(global_step)
        original(self, global_step)

    monkeypatch.setattr(Trainer, "training_step", count)
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", spy)
    metrics = run(
        recipe, tmp_path / "out", method("peft-adalora", interval=2, final_ratio=0.4), "train.max_steps=20",
        "train.batch_size=16", f"train.gradient_accumulation={accumulation}",
    )  # fmt: skip
    assert seen == list(range(1, 21))
    assert set(schedules) == {(20, 3, 8, 2)}
    assert min(sizes) > 0
    # The budget is met at step 20 - 8 (ties may cost PEFT's threshold more), and not moved afterwards.
    ranks = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert sum(ranks["final"].values()) == metrics["total_rank"] <= 2 * LINEAR_MODULES
    steps = sorted({change["step"] for change in ranks["history"]})
    assert steps[0] > 3
    assert steps[-1] == 12
    assert all(step % 2 == 0 for step in steps)
    state = dict.fromkeys(ranks["final"], 3)
    for change in ranks["history"]:
        assert state[change["module"]] == change["old"]
        state[change["module"]] = change["new"]
    assert state == ranks["final"]


def test_adalora_reports_what_its_file_holds(recipe: Path, tmp_path: Path) -> None:
    import safetensors.torch

    metrics = run(recipe, tmp_path / "out", method("peft-adalora", interval=1), "train.max_steps=20")
    saved = safetensors.torch.load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    held = sum(tensor.numel() for name, tensor in saved.items() if "lora_" in name)
    ranks = json.loads((tmp_path / "out" / "ranks.json").read_text())["final"]
    for name, rank in ranks.items():
        assert saved[f"base_model.model.{name}.lora_E"].shape[0] == rank
    assert metrics["active_params"] == held
    assert metrics["trainable_params"] == held + HEAD
    assert metrics["training_params"] == 3 * (COMPONENTS + LINEAR_MODULES) + HEAD
    assert metrics["training_params"] > metrics["trainable_params"]
    logged = [event for event in RunDirectory(tmp_path / "out").read_events() if event["event"] == "step"]
    assert logged[0]["total_rank"] == 3 * LINEAR_MODULES
    assert logged[-1]["total_rank"] == metrics["total_rank"]
    assert {"budget.png", "rank_history.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_adaloras_penalty_is_in_training_losses_only() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    base = BertForSequenceClassification(config)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}

    def loss(model: Any) -> float:
        return model(**batch).loss.item()

    plain = loss(base.eval())
    model = PeftAdaLora(r=2, target_modules=["query"], orth_reg_weight=0.25, task_type="SEQ_CLS").put_on(base)
    layer = base.bert.encoder.layer[0].attention.self.query
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    distances = [torch.dist(gram, torch.eye(3)) for gram in (A @ A.T, B.T @ B)]
    penalty = 0.25 * sum(distance.item() for distance in distances) / 2
    assert loss(model.eval()) == pytest.approx(plain, abs=1e-6)
    assert loss(model.train()) == pytest.approx(plain + penalty, abs=1e-6)
    assert loss(model.eval()) == pytest.approx(plain, abs=1e-6)
    assert model.peft_config["default"].orth_reg_weight == 0.25  # and so it is saved


def test_adalora_makes_up_for_a_skipped_final_allocation(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    calls = []
    original = AdaLoraModel.update_and_allocate
    steps = [0]

    def skipped(self: AcceleratedOptimizer) -> bool:  # noqa: ARG001 - a property
        return steps[0] == 10

    def spy(self: AdaLoraModel, global_step: int) -> None:
        calls.append(global_step)
        original(self, global_step)

    step = Trainer.training_step

    def count(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", count)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(skipped))
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", spy)
    metrics = run(recipe, tmp_path / "out", method("peft-adalora"), "train.max_steps=20")
    assert calls == [*range(1, 10), 10, *range(12, 21)]  # step 11 made the allocation of step 10
    assert metrics["total_rank"] <= 2 * LINEAR_MODULES


def test_adalora_refuses_what_cannot_work(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="init_r"):
        PeftAdaLora(r=4, init_r=4)
    with pytest.raises(ConfigError, match="too short for AdaLoRA"):
        rehearse(load_recipe(recipe, [method("peft-adalora", warmup_ratio=0.6), "train.max_steps=1"]), recipe)
    with pytest.raises(ConfigError, match="beta1=0"):
        PeftAdaLora(beta1=0.0)
    assert PeftAdaLora(r=1).start_rank == 2
    assert PeftAdaLora(r=8).start_rank == 12


def test_names_that_match_nothing_are_refused_for_baselines_too(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'query'"):
        rehearse(load_recipe(recipe, [method("peft-lora", target_modules=["qurey"])]), recipe)
    with pytest.raises(RecipeError, match=r"method\.r'"):
        load_recipe(recipe, ["method={name: full, r: 8}"])
