"""The scaling study: what it varies, what it counts and times, and that what was measured stays measured."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

# As Python itself does for a script: its folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import results_page
import scaling
from ranktune.adapters import updates
from stepcost.machine import Clock, Machine, Precision
from stepcost.models import ENCODER_TARGETS, adapt, encoder
from stepcost.timing import Spread
from stepcost.variants import FROZEN, REFERENCE, VARIANTS, Variant
from sweeps import hooks
from sweeps.axes import AXES, Axis, Setting, chosen, miniature
from sweeps.chart import sweep_figure
from sweeps.hooks import HookedStep, HookTime, Stack, hook_case
from sweeps.memory import memory_case, trained_bytes
from sweeps.points import Point, Points
from sweeps.tables import PANELS, table, told

SMALL = Setting(width=64, modules=7, sequences=2, tokens=8, r=2)
WIDTH, HIDDEN = 64, 256


def variants(*names: str) -> list[Variant]:
    return [VARIANTS[name] for name in names]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return encoder(WIDTH, SMALL.layers, SMALL.tokens)


# What is varied


def test_the_axes_reach_as_far_as_the_study_is_asked_to():
    reach = {name: (axis.values[0], axis.values[-1]) for name, axis in AXES.items()}
    assert reach["rank"] == (8, 256)
    assert reach["width"] == (384, 4096)
    assert AXES["controller"].values == (12, 48, 192, 768)
    for axis in AXES.values():
        axis.refuse_impossible()
        assert list(axis.values) == sorted(axis.values)


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_one_thing_is_varied_and_the_rest_stays(axis: Axis):
    for value in axis.values:
        setting = axis.at(value)
        assert getattr(setting, axis.field) == value
        assert replace(setting, **{axis.field: 0}) == replace(axis.fixed, **{axis.field: 0})


@pytest.mark.parametrize("modules", [7, 19])
def test_an_encoder_has_as_many_adapted_modules_as_its_setting_says(modules: int):
    setting = replace(SMALL, modules=modules)
    model = encoder(setting.width, setting.layers, setting.tokens)
    adapted = adapt(model, VARIANTS["lora"], 2, 0.0, ENCODER_TARGETS, model.classifier)
    assert len(list(updates(adapted))) == modules


def test_axes_and_points_are_chosen_by_words():
    rank, length = chosen("length,rank", ["rank=64,8,8"])
    assert (rank.name, rank.values, rank.fixed) == ("rank", (8, 64), AXES["rank"].fixed)
    assert length == AXES["length"]
    assert [axis.name for axis in chosen(None, [])] == list(AXES)
    for axis in chosen(None, [], small=True):
        assert len(axis.values) == 2
        assert all(axis.at(value).width <= 128 and axis.at(value).modules <= 13 for value in axis.values)


@pytest.mark.parametrize(
    ("names", "points", "said"),
    [
        ("rnak", [], "Did you mean 'rank'"),
        ("rank", ["width=384"], "AXIS=VALUES of rank"),
        ("rank", ["rank"], "8,64"),
        ("width", ["width=100"], "width=100: .*multiple of 64"),
        ("modules", ["modules=7,12"], "modules=12: .*7, 13, 19"),
        ("modules", ["modules=1"], "modules=1: "),
    ],
)
def test_words_that_mean_nothing_are_refused(names: str, points: list[str], said: str):
    with pytest.raises(typer.BadParameter, match=said):
        chosen(names, points)


def test_a_controller_may_have_any_number_of_modules():
    assert chosen("controller", ["controller=1,10"])[0].values == (1, 10)


# What is counted


def test_trained_bytes_are_the_formula_s(base):
    """Factors and head four times over (values, gradients, two moments), and four bytes of a step for each tensor."""
    rows = {row.variant: row for row in memory_case(base, variants(FROZEN, REFERENCE), SMALL, Machine())}
    factors = SMALL.r * (5 * (WIDTH + WIDTH) + 2 * (WIDTH + HIDDEN))
    head = 2 * WIDTH + 2
    assert rows[FROZEN].trained == 4 * (4 * head + 2)
    assert rows[REFERENCE].trained == 4 * (4 * (head + factors) + 2 + 2 * SMALL.modules)


def test_kept_bytes_are_what_an_adapter_adds_to_a_frozen_model(base):
    """Beside the frozen model, LoRA keeps every module's input, and its A x [tokens, r]; the rest is shared."""
    # The inputs of query, key, value and of the last dense layer are needed by other operators too, or are one.
    counted = memory_case(base, variants(FROZEN, REFERENCE, "lora"), SMALL, Machine())
    rows = {row.variant: row for row in counted}
    wider = memory_case(base, variants(REFERENCE, "lora"), replace(SMALL, r=5), Machine())
    tokens = SMALL.sequences * SMALL.tokens
    # The pooler sees one token of each sequence.
    each_component = 4 * (6 * tokens + SMALL.sequences)
    for row in wider:
        assert row.kept - rows[row.variant].kept == 3 * each_component
    assert rows[FROZEN].kept < rows["lora"].kept - 2 * each_component


def test_ratios_are_to_peft_lora(base):
    rows = {row.variant: row for row in memory_case(base, variants(FROZEN, REFERENCE, "mor"), SMALL, Machine())}
    reference, mor = rows[REFERENCE], rows["mor"]
    assert (reference.to_reference, reference.kept_to_reference) == (1.0, 1.0)
    assert mor.kept_to_reference == mor.kept / reference.kept
    assert mor.to_reference == (mor.kept + mor.trained) / (reference.kept + reference.trained) > 1
    assert rows[FROZEN].to_reference < 1


def test_a_nested_adapter_is_counted_at_its_largest_rank(base):
    """After a step, its controller has drawn a lower one."""
    setting = replace(SMALL, r=16)
    rows = {row.variant: row for row in memory_case(base, variants(REFERENCE, "lora", "dylora"), setting, Machine())}
    assert rows["dylora"].kept == rows["lora"].kept


def test_what_an_optimizer_never_stepped_is_its_parameters_alone():
    parameter = torch.nn.Parameter(torch.zeros(10))
    assert trained_bytes(torch.optim.AdamW([parameter])) == 40


# What is timed


@dataclass(frozen=True)
class Ticking(Machine):
    """A clock on which reading it takes one second and `pass_time` as many as wanted."""

    read = [0.0]  # noqa: RUF012  (shared by the copies of a frozen class)

    def now(self) -> float:
        self.read[0] += 1
        return self.read[0]

    def pass_time(self, seconds: float) -> None:
        self.read[0] += seconds


def test_a_controller_s_time_is_that_of_its_hooks_and_of_nothing_else():
    machine = Ticking()

    def attach(model, optimizer):  # noqa: ARG001
        optimizer.register_step_pre_hook(lambda *_: machine.pass_time(10))
        optimizer.register_step_post_hook(lambda *_: machine.pass_time(100))
        optimizer.register_step_post_hook(lambda *_: machine.pass_time(1000))
        return lambda step: machine.pass_time(10_000 * step)

    model = torch.nn.Linear(3, 3)
    model.register_forward_hook(lambda *_: machine.pass_time(1e6))
    model.weight.register_hook(lambda _: machine.pass_time(1e7))
    step = HookedStep(model, replace(VARIANTS["lora"], attach=attach), torch.ones(2, 3), machine)
    # Two seconds of reading the clock beside the hooks' own, one beside the optimizer's.
    assert step() == HookTime(11_112, 1)
    assert step() == HookTime(21_112, 1)


@pytest.mark.parametrize("variant", hooks.CONTROLLED, ids=lambda variant: variant.name)
def test_a_stack_of_modules_trains_under_every_controller(variant: Variant):
    base = Stack(32, 3)
    assert len(list(base.parameters())) == 1
    model = adapt(base, variant, 2, 0.0, ["linear"])
    x = torch.randn(4, 32)
    torch.testing.assert_close(base(x), x)
    assert len({name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}) == 3
    step = HookedStep(model, variant, x, Machine())
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    taken = [step() for _ in range(3)]
    assert all(time.controller > 0 and time.optimizer > 0 for time in taken)
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters() if name in before)


def test_controllers_take_turns_and_every_one_has_its_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hooks.HookedStep, "__call__", lambda step: HookTime(len(list(step.model.modules())), 2.0))
    rows = hook_case(variants("dylora", "peft-adalora"), replace(SMALL, modules=2), Machine(), rounds=3, warmup=1)
    assert [row.variant for row in rows] == ["dylora", "peft-adalora"]
    assert all(row.optimizer == Spread(2.0, 2.0, 2.0) for row in rows)


# What stays measured


@dataclass
class Figure:
    figure: int


def test_a_point_is_measured_once_unless_anything_about_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def ask(points: Points, point: Point) -> dict[str, Any]:
        return points.measured(point, lambda: asked.append(point) or [Figure(len(asked))])

    points = Points(tmp_path, Machine())
    point = Point("rank", 8, "time", {"rounds": 3, "shape": (2, 8)})
    assert points.kept(point) is None
    first = ask(points, point)
    assert first["rows"] == [{"value": 8, "figure": 1}]
    assert first["environment"]["versions"]["torch"] == torch.__version__
    assert ask(points, point) == points.kept(point) == first
    for other in (replace(point, value=16), replace(point, part="memory"), replace(point, axis="width")):
        ask(points, other)
    assert len(asked) == 4
    ask(points, replace(point, question={"rounds": 5, "shape": (2, 8)}))
    assert len(asked) == 5
    assert points.kept(point) is None
    ask(Points(tmp_path, Machine(), fresh=True), replace(point, question={"rounds": 5, "shape": (2, 8)}))
    assert len(asked) == 6
    described = Machine().describe()
    monkeypatch.setattr(Machine, "describe", lambda _: described | {"processor": "another one"})
    assert points.kept(replace(point, value=16)) is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`scaling.main` with few rounds; the process keeps its threads."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--miniature"])

    def start(**given: Any) -> Path:
        usual = {"rounds": 2, "warmup": 0, "methods": "lora,dylora,peft-adalora", "miniature": True, "out": tmp_path}
        scaling.main(**(usual | given))
        return tmp_path

    return start


def test_a_miniature_of_everything(run, capsys: pytest.CaptureFixture[str]):
    out = run()
    for name in AXES:
        record = json.loads((out / f"{name}.json").read_text())
        axis = miniature(AXES[name])
        for part in ["hooks"] if axis.hooks else ["time", "memory"]:
            rows = record[part]["rows"]
            expected = {"dylora", "peft-adalora"} | (set() if axis.hooks else {"lora", FROZEN, REFERENCE})
            assert sorted((row["value"], row["variant"]) for row in rows) == sorted(product(axis.values, expected))
            assert record[part]["environment"]["command"] == "scaling.py --miniature"
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "PEFT AdaLoRA" in capsys.readouterr().out


def test_what_is_there_is_not_measured_again_and_the_parts_of_a_sweep_come_together(
    run, monkeypatch: pytest.MonkeyPatch
):
    out = run(axes="rank", part=scaling.Part.memory)
    assert {"time", "memory"} & json.loads((out / "rank.json").read_text()).keys() == {"memory"}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(scaling, "memory_case", never)
    run(axes="rank", part=scaling.Part.time)
    record = json.loads((out / "rank.json").read_text())
    assert {"time", "memory"} <= record.keys()
    for row in record["time"]["rows"]:
        assert (row["r"], row["tokens"], row["batch"]) == (row["value"], 8, 2)
        if row["variant"] == REFERENCE:
            assert row["step_to_reference"]["median"] == 1.0
    monkeypatch.setattr(scaling, "time_case", never)
    run(axes="rank")
    for other in ({"methods": "lora"}, {"dtype": Precision.bf16}, {"fresh": True}):
        with pytest.raises(AssertionError, match="measured again"):
            run(axes="rank", **other)


def test_a_part_that_was_not_measured_at_every_value_is_left_out(run):
    run(axes="rank", points=["rank=2"], part=scaling.Part.memory)
    out = run(axes="rank", points=["rank=2,3"], part=scaling.Part.time)
    record = json.loads((out / "rank.json").read_text())
    assert "memory" not in record
    assert {row["value"] for row in record["time"]["rows"]} == {2, 3}


def test_a_sweep_is_of_the_newest_of_its_points_one_thread_and_the_same_weights(run, monkeypatch: pytest.MonkeyPatch):
    threads, weights, days = [], [], iter("2345")
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    described = Machine().describe()
    monkeypatch.setattr(Machine, "describe", lambda _: described | {"date": next(days, "1")})

    def count(base, *_):
        weights.append(base.classifier.weight.clone())
        return [Figure(1)]

    monkeypatch.setattr(scaling, "memory_case", count)
    monkeypatch.setattr(scaling, "told", lambda _: [])
    records = []
    real = scaling.sweep
    monkeypatch.setattr(scaling, "sweep", lambda *given: records.append(real(*given)) or records[-1])
    run(axes="rank", points=["rank=2,3"], part=scaling.Part.memory)
    assert records[0]["memory"]["environment"]["date"] == "3"
    assert threads == [1]
    assert torch.equal(*weights)


def test_a_study_that_was_stopped_goes_on(run, monkeypatch: pytest.MonkeyPatch):
    real, done = scaling.memory_case, []

    def stops(base, chosen_variants, setting, machine):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(setting.r)
        return real(base, chosen_variants, setting, machine)

    monkeypatch.setattr(scaling, "memory_case", stops)
    with pytest.raises(KeyboardInterrupt):
        run(axes="rank", part=scaling.Part.memory)
    monkeypatch.setattr(scaling, "memory_case", lambda *given: done.append(given[2].r) or real(*given))
    run(axes="rank", part=scaling.Part.memory)
    assert done == [2, 4]


def test_processor_time_is_refused_on_a_gpu(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(typer.BadParameter, match="nothing of a GPU"):
        run(device="cuda", clock=Clock.cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="no usable CUDA device"):
        run(device="cuda")


# What is shown


def record_of(values: list[int], **parts: dict[str, Any]) -> dict[str, Any]:
    """A sweep over ranks; parts: variant to one figure a value."""
    rows = {
        part: {
            "environment": ENVIRONMENT,
            "rows": [
                {"value": value, "variant": name, key: figure}
                for name, figures in given.items()
                for value, figure in zip(values, figures, strict=True)
            ],
        }
        for part, given in parts.items()
        for key in [next(panel.key for panel in PANELS if panel.part == part)]
    }
    settings = {"precision": "fp32", "clock": "cpu", "rounds": 7}
    return {"label": "rank", "fixed": {"width": 1536}, "values": values, "settings": settings, **rows}


ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "scaling.py --axes rank",
    "versions": {"torch": "2.0"},
    "processor": "some processor",
    "device_name": None,
    "cores": 2,
}


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median / 2, "high": median * 2}


def test_tables_tell_medians_and_quartiles_in_their_unit():
    record = record_of([8, 1024], memory={"lora": [1.0, 0.123456]}, hooks={"dylora": [spread(0.0015), spread(2.0)]})
    memory, controllers = told(record)
    assert table(record, memory, quartiles=True) == (["rank", "8", "1,024"], [["ranktune lora", "1.00", "0.12"]])
    assert table(record, controllers, quartiles=True)[1] == [
        ["ranktune dylora", "1.50 (0.75-3.00)", "2,000 (1,000-4,000)"]
    ]
    always_one = record_of([8, 1024], time={REFERENCE: [{"median": 1.0, "low": 1.0, "high": 1.0}] * 2})
    assert table(always_one, told(always_one)[0], quartiles=True)[1] == [["PEFT LoRA", "1.00", "1.00"]]
    assert table(record, controllers, quartiles=False)[1] == [["ranktune dylora", "1.50", "2,000"]]


def test_a_picture_shows_every_figure_and_names_every_line():
    names = [name for name in VARIANTS if name != REFERENCE]
    values = [8, 32, 256]
    figures = {name: [spread(0.5 + place), spread(1.0), spread(2.0)] for place, name in enumerate(names)}
    figures[REFERENCE] = [{"median": 1.0, "low": 1.0, "high": 1.0}] * 3
    figure = sweep_figure(record_of(values, time=figures, memory={name: [1.5, 0.25, 3.0] for name in figures}))
    time, memory = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["ratio to PEFT LoRA"] * 2
    drawn = [list(line.get_ydata()) for line in time.get_lines() if len(line.get_ydata()) == 3]
    for name in figures:
        assert [point["median"] for point in figures[name]] in drawn
    assert all(list(line.get_ydata()) == [1.5, 0.25, 3.0] for line in memory.get_lines() if len(line.get_ydata()) == 3)
    figure.canvas.draw()
    assert [label.get_text() for label in time.get_xticklabels()] == ["8", "32", "256"]
    assert {"1", "2", "5"} <= {label.get_text() for label in time.get_yticklabels()}
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {VARIANTS[name].label for name in figures}
    lines = legend.get_lines()
    # Told apart by dashes, and by markers where dashes are too short to be seen.
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(figures)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(figures)
    # Nothing is written over anything else.
    boxes = [legend.get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    boxes.append(figure._suptitle.get_window_extent())
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


def test_the_quartiles_are_drawn_where_they_are():
    figure = sweep_figure(record_of([8, 16], hooks={"dylora": [spread(0.002), spread(0.01)]}))
    (axes,) = figure.axes
    (bars,) = [collection for collection in axes.collections if len(collection.get_segments()) == 2]
    ends = [sorted(float(y) for _, y in segment) for segment in bars.get_segments()]
    assert ends == [pytest.approx([1.0, 4.0]), pytest.approx([5.0, 20.0])]


def test_figures_are_on_the_page(tmp_path: Path):
    (tmp_path / "scaling").mkdir()
    record = record_of([8, 64], time={"lora": [spread(0.9), spread(0.95)]}, memory={"lora": [1.01, 1.02]})
    (tmp_path / "scaling" / "rank.json").write_text(json.dumps(record))
    page = results_page.page(tmp_path)
    for words in (
        "### By rank",
        "The rest as it is: width 1,536; fp32.",
        "| ranktune lora | 0.90 (0.45-1.80) | 0.95 (0.47-1.90) |",
        "| ranktune lora | 1.01 | 1.02 |",
        "ratio to PEFT LoRA, cpu time, medians of 7 interleaved rounds (quartiles). 2026-01-02, some processor",
        "ratio to PEFT LoRA, an exact count.",
        "python benchmarks/scaling.py --axes rank`",
    ):
        assert words in page, words
    assert "Not run yet." in results_page.page(tmp_path / "nowhere").split("## How that grows")[1]
