"""The benchmark's own pieces: what it counts, how it compares, and one tiny run from end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import AdaLoraModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# As Python itself does for a script: its folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import squeeze as squeeze_benchmark
import step_cost
from ranktune.adapters import updates
from stepcost import options
from stepcost.cases import encoder_batch
from stepcost.machine import Machine, Precision
from stepcost.models import BLOCK_TARGETS, ENCODER_TARGETS, LlamaBlock, adapt, encoder
from stepcost.saved_bytes import saved_bytes
from stepcost.timing import StepTime, TrainingStep, interleave, ratios
from stepcost.variants import FROZEN, VARIANTS

CPU = Machine()


class Scaled(nn.Module):
    """y = x exp(p), after a product that forward throws away."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        (x.cos() * x.sin() * self.p).sum()
        return x * self.p.exp()


def test_a_storage_held_twice_counts_once_and_weights_and_input_do_not() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    # Held: the first product's input (the input itself), the ReLU's output, as the second product's input once more.
    counted = saved_bytes(model, 6, 5, CPU)
    assert (counted.per_token, counted.constant) == (8 * 4, 0)


def test_what_does_not_grow_with_the_batch_is_counted_apart_and_what_was_freed_not_at_all() -> None:
    counted = saved_bytes(Scaled(), 6, 5, CPU)
    assert (counted.per_token, counted.constant) == (0, 6 * 4)


class Allocations(TorchDispatchMode):
    """Remembers every storage that operators make, without keeping any alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of those that still exist."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_count_is_what_is_alive_after_forward(name: str, dropout: float) -> None:
    """The hooks see only what goes through autograd's own saving; this sees all memory, however it is held."""
    model = adapt(LlamaBlock(64, 96), VARIANTS[name], 4, dropout, BLOCK_TARGETS)
    model(torch.randn(1, 3, 64))  # cached norms are made once, and are there afterwards
    alive: list[int] = []
    for sequences in (1, 2):
        x = torch.randn(sequences, 5, 64, requires_grad=True)
        with Allocations() as allocations:
            loss = model(x).sum()
        alive.append(allocations.alive())
        loss.backward()
    assert saved_bytes(model, 64, 5, CPU).per_token == (alive[1] - alive[0]) / 5 > 0


def test_rounds_are_interleaved_and_shuffled_and_warm_up_does_not_count() -> None:
    called: list[str] = []

    def step(name: str, share: float) -> Any:
        def run() -> StepTime:
            called.append(name)
            drift = 1.0 + len(called) // 3  # the machine slows down, the same for all of a round
            return StepTime(share * drift, 2 * share * drift)

        return run

    ticks: list[None] = []
    steps = {"a": step("a", 1.0), "b": step("b", 2.0), "c": step("c", 3.0)}
    times = interleave(steps, rounds=20, warmup=4, each_round=lambda: ticks.append(None))
    assert len(called) == 3 * 24
    assert len(ticks) == 24
    rounds = [tuple(called[start : start + 3]) for start in range(0, len(called), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) == 6
    assert {name: len(taken) for name, taken in times.items()} == {"a": 20, "b": 20, "c": 20}
    # The first round that counts is the fifth.
    assert min(taken.step for taken in times["a"]) >= 2 * 5.0


def test_ratios_are_formed_within_a_round() -> None:
    spread = ratios([2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert (spread.low, spread.median, spread.high) == (2.5, 3.0, 3.5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_its_own_head_and_adapter_over_shared_weights(name: str) -> None:
    torch.manual_seed(0)
    base = encoder(64, layers=1, positions=8)
    variant = VARIANTS[name]
    model = adapt(base, variant, 2, 0.0, ENCODER_TARGETS, base.classifier)
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    own_head = {parameter.data_ptr() for parameter in base.classifier.parameters()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.data_ptr() in shared - own_head for parameter in frozen if parameter.numel() > 1)
    assert not {parameter.data_ptr() for parameter in trained.values()} & shared
    # Six linear layers and a pooler.
    adapted = {key.partition(".layer.")[2] or "pooler" for key in trained if "classifier" not in key}
    assert (len(adapted) >= 7) == (name != FROZEN)
    assert sum("classifier" in key for key in trained) == 2

    before = {key: parameter.detach().clone() for key, parameter in trained.items()}
    batch = encoder_batch(base, (2, 8), CPU)
    step = TrainingStep(model, variant, batch, CPU)
    taken = [step() for _ in range(3)]
    assert all(0 < time.forward_backward <= time.step for time in taken)
    assert batch["inputs_embeds"].grad is not None
    moved = [key for key, parameter in trained.items() if not torch.equal(before[key], parameter)]
    assert sorted(moved) == sorted(trained)


def test_ranks_are_scored_in_the_timed_step_as_each_row_says() -> None:
    """PEFT's allocator by hand, IncreLoRA's dense gradients in the row that says so, and in no other."""
    base = encoder(64, layers=1, positions=8)
    scored = {}
    for name in ("peft-adalora", "increlora", "increlora-scored"):
        model = adapt(base, VARIANTS[name], 2, 0.0, ENCODER_TARGETS, base.classifier)
        step = TrainingStep(model, VARIANTS[name], encoder_batch(base, (2, 8), CPU), CPU)
        step()
        step()
        if name == "peft-adalora":
            allocator: Any = next(module for module in model.modules() if isinstance(module, AdaLoraModel))
            scored[name] = len(allocator.rankallocator.ipt) > 0
        else:
            scored[name] = any(update.rank_average.abs().sum() > 0 for _, update in updates(model))
    assert scored == {"peft-adalora": True, "increlora": False, "increlora-scored": True}


def test_bfloat16_runs_under_autocast_over_a_bfloat16_base() -> None:
    machine = Machine(precision=Precision.bf16)
    base = encoder(64, layers=1, positions=8).to(machine.dtype)
    model = adapt(base, VARIANTS["dora"], 2, 0.0, ENCODER_TARGETS, base.classifier)
    step = TrainingStep(model, VARIANTS["dora"], encoder_batch(base, (2, 8), machine), machine)
    assert math.isfinite(step().step)


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (options.ranks, "8,x", "8,64"),
        (options.ranks, "0", "from 1"),
        (options.shapes, "16*128", "16x128"),
        (options.methods, "lora,pfet-dora", "Did you mean 'peft-dora'"),
    ],
)
def test_words_that_mean_nothing_are_refused(read: Any, text: str, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        read(text)


def test_a_tiny_run_leaves_figures_and_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_cost, "BLOCK_WIDTH", 64)
    monkeypatch.setattr(step_cost, "BLOCK_INTERMEDIATE", 96)
    monkeypatch.setattr(step_cost, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(sys, "argv", ["step_cost.py", "--width", "64"])
    step_cost.main(width=64, layers=1, shapes="2x8,1x16", ranks="2", methods="lora", rounds=3, warmup=1, out=tmp_path)
    record = json.loads((tmp_path / "step_cost.json").read_text())
    assert {row["variant"] for row in record["time"]} == {"frozen", "peft-lora", "lora"}
    assert len(record["time"]) == 2 * 3
    assert len(record["bytes"]) == 2 * 3
    for row in record["time"]:
        if row["variant"] == "peft-lora":
            assert row["step_to_reference"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert (row["stock_to_step"] is None) == (row["variant"] != "lora")
    assert record["environment"]["command"] == "step_cost.py --width 64"
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "step_cost.png").read_bytes().startswith(b"\x89PNG")
    assert "ranktune lora is" in capsys.readouterr().out


def test_peft_and_squeeze_are_timed_on_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one layer both keep the same components: equal figures show that both were given the same work."""

    class Here:
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def apply(self, function: Any, arguments: Any) -> Any:
            return function(*arguments)

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(squeeze_benchmark.multiprocessing, "get_context", lambda _: Here)
    monkeypatch.setattr(Here, "Pool", lambda _: Here(), raising=False)
    case = squeeze_benchmark.synthetic(tmp_path / "adapter", 48, 8)
    results = squeeze_benchmark.measure(case, 2, 1, tmp_path)
    assert [row.way for row in results] == ["PEFT", "ours, equal rank", "ours, equal parameters"]
    values = torch.linalg.svdvals(squeeze_benchmark.dense_updates(tmp_path / "adapter")["layer"])
    lost = float(values[2:].norm() / values.norm())
    for row in results:
        assert (row.total_rank, row.parameters) == (2, 2 * 96)
        assert row.error == pytest.approx(lost, rel=1e-5)
        assert row.seconds > 0.0
