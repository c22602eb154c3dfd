"""The report of a comparison from made-up records: numbers, words, files, and the page in a real browser."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats

from ranktune.compare.budget import Share
from ranktune.compare.grid import Grid
from ranktune.compare.methods import parse_methods
from ranktune.compare.record import failed
from ranktune.compare.search import Trial
from ranktune.compare.store import Store
from ranktune.compare.summary import Summary, summarise
from ranktune.recipe import Recipe
from ranktune.report.comparison import figures, pictures, text, write_report
from ranktune.report.comparison.details import MethodDetails, read_details
from ranktune.report.comparison.marks import (
    front_steps,
    marks,
    panel_range,
    parameter_panels,
    scores_astray,
    spread_out,
)
from ranktune.report.comparison.terminal import outcome_lines, outcome_table
from ranktune.report.rank_history import RankHistory
from tests.browser import Browser, find_browser

SCORES = {
    "lora": [0.70, 0.72, 0.71],
    "dynamic-dora": [0.75, 0.78, 0.74],
    "dylora": [0.69, 0.70, None],
    "mor[num_experts=2]": [0.71, 0.71, 0.71],
    "full": [0.80, 0.79, 0.81],
    "<b>&lora[r=1]": [None, None, None],
}
PARAMETERS = {"lora": 1000, "dynamic-dora": 998, "dylora": 1000, "mor[num_experts=2]": 1100, "full": 90_000}
MODULES = [f"bert.encoder.layer.{layer}.{kind}" for layer in range(3) for kind in ("query", "output.dense")]


def variants() -> list[Any]:
    known = parse_methods(",".join(label for label in SCORES if not label.startswith("<")))
    odd = parse_methods("lora[r=1]")[0]
    return [*known, type(odd)("<b>&lora[r=1]", "lora", {"r": 1})]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary, Store]:
    """Records of a whole grid, and run directories of some of its runs."""
    out = tmp_path_factory.mktemp("comparison")
    shares = tuple((v, Share({"name": v.name}, None if v.name == "full" else 1000, 1000, "r=2")) for v in variants())
    recipe = Recipe(method={"name": "lora", "r": 2}, output="unused")
    grid = Grid(recipe, shares, (0, 1, 2), (0,), 0.1, 1000, out / "runs")
    store = Store(grid.runs)
    store.start()
    centres = {variant.label: 1e-3 * variant.learning_rate_factor for variant, _ in shares}
    while missing := [run for run in grid.wanted(store.records()) if not (store.folder / f"{run.id}.json").exists()]:
        for run in missing:
            record = failed(run, "Traceback\nValueError: <script>no</script>", 1.0)
            score = (
                SCORES[run.label][run.seed]
                if run.phase == "final"
                else 0.6 - abs(np.log10(run.rate / centres[run.label]))
            )
            if run.label.startswith("<"):
                score = None
            if score is not None:
                _succeed(record, score, PARAMETERS[run.label])
            store.write(run, record)
    _run_directory(store.folder / "dynamic-dora-final-lr0.00316-seed0", moving=True)
    _run_directory(store.folder / "dylora-final-lr0.001-seed0", moving=False)
    (store.folder / "dylora-final-lr0.001-seed0" / "rank_curve.csv").write_text(
        "rank,parameters,adapter_bytes,loss,accuracy\n1,500,2500,1.2,0.6\n2,1000,5000,1.1,0.69\n"
    )
    _run_directory(store.folder / "mor-num-experts-2-final-lr0.001-seed0", moving=False, experts=True)
    return out, summarise(grid, store.records()), store


def _succeed(record: dict[str, Any], score: float, parameters: int) -> None:
    record["comparison"] |= {"score": float(score), "loss": 1.0, "metric": "accuracy", "greater_is_better": True}
    record["run_info"]["error_msg"] = ""
    record["train_info"] = {
        "accelerator_memory_reserved_avg": 100 << 20, "accelerator_memory_max": 120 << 20,
        "accelerator_memory_reserved_99th": 119 << 20, "memory_kind": "process", "train_time": 12.5,
        "tokens_per_second": 1234.0, "file_size": 3 << 20, "num_trainable_params": parameters + 34,
        "num_total_params": 100_000, "num_adapter_params": parameters, "num_training_params": parameters + 500,
        "status": "success", "metrics": [{"step": 40}],
    }  # fmt: skip
    record["meta_info"] |= {
        "model_info": {"name": "tiny"},
        "dataset_info": {"description": "made up", "fingerprint": "f"},
        "package_info": {"torch-version": "2"},
    }


def _run_directory(folder: Path, moving: bool, experts: bool = False) -> None:
    folder.mkdir()
    history, events = [], []
    if moving:
        history = [
            {"step": 10 * (number + 1), "module": module, "old": 3, "new": number % 4, "score": 0.1}
            for number, module in enumerate(MODULES)
        ]
        events = [
            {"event": "step", "step": step, "loss": 1.0, "rank_budget": 18 - step / 5} for step in range(0, 61, 10)
        ]
    final = {module: (number % 4 if moving else 2) for number, module in enumerate(MODULES)}
    importance = {"importance": {m: {"kept": [0.5, 0.01], "dropped": [0.001]} for m in MODULES}} if moving else {}
    (folder / "ranks.json").write_text(json.dumps({"final": final, "history": history, **importance}))
    if experts:
        for step, load in ((20, [0.5, 0.5]), (40, [0.25, 0.75])):
            events.append({"event": "routers", "step": step, "modules": {module: {"load": load} for module in MODULES}})
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_summaries_are_what_the_records_say(comparison: tuple[Path, Summary, Store]) -> None:
    _, summary, _ = comparison
    methods = {method.label: method for method in summary.methods}
    assert list(methods) == list(SCORES)
    found = methods["dynamic-dora"]
    assert found.rate == 0.00316  # the best of the search
    assert methods["lora"].rate == 0.001
    assert found.scores == {0: 0.75, 1: 0.78, 2: 0.74}
    assert found.interval is not None
    assert found.interval.mean == pytest.approx(np.mean([0.75, 0.78, 0.74]))
    assert found.test is not None
    assert found.test.p_t == pytest.approx(stats.ttest_rel(SCORES["dynamic-dora"], SCORES["lora"]).pvalue)
    assert found.residual == -2
    assert methods["full"].residual is None
    partly = methods["dylora"].test
    assert partly is not None
    assert partly.difference.count == 2  # the seeds both have
    assert "seed 2 failed: ValueError" in methods["dylora"].troubles[0]
    nothing = methods["<b>&lora[r=1]"]
    assert (nothing.rate, nothing.interval, nothing.test, nothing.on_front) == (None, None, None, False)
    assert methods["lora"].test is None
    front = {label for label, method in methods.items() if method.on_front}
    assert front == {"dynamic-dora", "full"}  # though lora has two parameters more than the former
    assert {label: method.lost for label, method in methods.items() if method.lost} == {"dylora": {2: "failed"}}
    assert summary.waiting == 0
    raw = [m.test.p_t for m in summary.methods if m.test and m.test.p_t is not None]
    assert methods["full"].p_corrected == pytest.approx(min(1.0, min(raw) * len(raw)))
    assert summary.different_data == []


def test_the_terminal_shows_a_row_a_method_and_what_must_not_be_missed(
    comparison: tuple[Path, Summary, Store],
) -> None:
    _, summary, _ = comparison
    console = Console(width=160, file=io.StringIO())
    console.print(outcome_table(summary))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for words in ("dynamic-dora", "0.7567", "mor[num_experts=2]", "90,000", "1,100", "2 of 3 (1 failed)", "0.00316"):
        assert words in shown, words
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(outcome_table(summary))
    assert "…" not in narrow.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    lines = outcome_lines(summary)
    assert any("differs significantly" in line or "better than lora" in line for line in lines)
    assert lines[-1].startswith("Not every run ended well: dylora: final lr 0.001 seed 2 failed: ValueError")
    assert "more notes in report.md" in lines[-1]
    few = replace(summary, methods=[method for method in summary.methods if not method.label.startswith("<")])
    assert "notes" not in outcome_lines(few)[-1]
    twice = replace(few, methods=[few.methods[2]] * 2)
    assert outcome_lines(twice)[-1].endswith("(1 more note in report.md)")


def test_other_data_is_noticed(comparison: tuple[Path, Summary, Store], tmp_path: Path) -> None:
    _, _, store = comparison
    records = store.records()
    odd = json.loads(json.dumps(records["full-final-lr0.0001-seed1"]))
    odd["meta_info"]["dataset_info"]["fingerprint"] = "other"
    shares = tuple((v, Share({"name": v.name}, 1000, 1000, "r=2")) for v in variants())
    recipe = Recipe(method={"name": "lora", "r": 2}, output="unused")
    grid = Grid(recipe, shares, (0, 1, 2), (0,), 0.1, 1000, tmp_path)
    summary = summarise(grid, {**records, "full-final-lr0.0001-seed1": odd})
    assert summary.different_data == ["full-final-lr0.0001-seed1"]


def test_files_of_the_report(comparison: tuple[Path, Summary, Store]) -> None:
    out, summary, store = comparison
    written = write_report(out, summary, store)
    names = {path.name for path in written}
    assert names == {
        "table.csv", "report.md", "report.html", "score.png", "pareto.png", "cost.png", "learning_rates.png"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    with (out / "table.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["lora"]["score_mean"]) == pytest.approx(0.71)
    assert rows["lora"]["p_t"] == ""
    found = next(method for method in summary.methods if method.label == "dynamic-dora")
    assert found.interval is not None
    assert found.test is not None
    expected = {
        "score_low": found.interval.low, "score_high": found.interval.high, "p_t": found.test.p_t,
        "p_t_holm": found.p_corrected, "p_wilcoxon": found.test.p_wilcoxon, "difference": 0.14 / 3,
        "difference_low": found.test.difference.low, "difference_high": found.test.difference.high,
        "adapter_params": 998, "trainable_params": 1032, "training_params": 1498, "total_params": 100_000,
        "train_seconds": 12.5, "tokens_per_second": 1234, "file_mib": 3,
        "memory_max_mib": 120, "memory_avg_mib": 100, "memory_99th_mib": 119,
    }  # fmt: skip
    assert {name: float(rows["dynamic-dora"][name]) for name in expected} == pytest.approx(expected)
    assert float(rows["full"]["trainable_params"]) == 90_034
    assert rows["mor[num_experts=2]"]["budget_residual"] == "100"
    report = (out / "report.md").read_text()
    for words in (
        "| dynamic-dora | 0.7567 |", "-2 (-0.20%)", "+100 (+10.00%)", "2.48 times", "p = 0.25", "1,498",
        "2 of 3 (1 failed)", "0 of 3 (no usable learning rate)",
        "no learning rate was usable", "ValueError", "95 % t-interval", "![score](score.png)", "torch-version: 2",
    ):  # fmt: skip
        assert words in report, words
    page = (out / "report.html").read_text()
    assert "| 12.5 | 1,234 | 120.0 MiB | 100.0 MiB | 119.0 MiB | 3.0 MiB |" in report
    assert "made up; 40 optimizer steps" in report
    tests = {row[0]: row for row in text.test_table(summary)[1]}
    numbers = found.test.p_t, found.p_corrected, found.test.p_wilcoxon
    assert tests["dynamic-dora"][4:] == [f"{number:.3g}" for number in numbers if number is not None]
    assert len(set(tests["dynamic-dora"][4:])) == 3
    assert "<script>no" not in page
    assert "<b>&lora" not in page
    assert "src=" not in page.split("<body>")[1].split("<script>")[0]
    before = page
    write_report(out, summary, store)
    assert (out / "report.html").read_text() == before


def drawn_from(tmp_path: Path, scores: dict[str, list[float | None]], parameters: dict[str, int]) -> Summary:
    """A summary of final runs alone, with a loss for a score; None has not been trained yet."""
    shares = tuple((v, Share({"name": v.name}, None, None, "")) for v in parse_methods(",".join(scores)))
    grid = Grid(Recipe(method={"name": "lora", "r": 2}, output="x"), shares, (0, 1), (), 0.1, 1000, tmp_path / "runs")
    store = Store(grid.runs)
    store.start()
    for run in grid.wanted({}):
        score = scores[run.label][run.seed]
        if score is not None:
            record = failed(run, "", 1.0)
            _succeed(record, score, parameters[run.label])
            record["comparison"] |= {"metric": "nats", "greater_is_better": False}
            store.write(run, record)
    return summarise(grid, store.records())


def test_methods_of_one_size_are_not_one_point_beside_a_larger_one(tmp_path: Path) -> None:
    scores = {"lora": [1.0, 1.1], "dora": [1.2, 1.3], "full": [0.9, 0.9]}
    summary = drawn_from(tmp_path, scores, {"lora": 1000, "dora": 1200, "full": 90_000})
    left, right = parameter_panels(summary.methods)
    assert [[method.label for method in panel] for panel in (left, right)] == [["lora", "dora"], ["full"]]
    assert not spread_out(left)
    low, high = panel_range(left)
    assert low < 1034 < 1234 < high < 2 * 1234
    figure = figures.pareto(summary)
    assert {trace.name: trace.xaxis for trace in figure.data if trace.mode == "markers"} == {
        "lora (front)": "x", "dora": "x", "full (front)": "x2"
    }  # fmt: skip
    many = drawn_from(tmp_path / "many", {f"lora[r={r}]": [1.0, 1.0] for r in (1, 4, 16)},
                      {"lora[r=1]": 1000, "lora[r=4]": 4000, "lora[r=16]": 16_000})  # fmt: skip
    assert len(parameter_panels(many.methods)) == 1
    assert figures.pareto(many).layout.xaxis.type == "log"


def test_a_loss_that_went_astray_does_not_hide_the_others(tmp_path: Path) -> None:
    parameters = {"lora": 1000, "dora": 1000}
    astray = drawn_from(tmp_path, {"lora": [1.0, 1.1], "dora": [900.0, 2e4]}, parameters)
    near = drawn_from(tmp_path / "near", {"lora": [1.0, 1.1], "dora": [9.0, 20.0]}, parameters)
    assert [figures.scores(summary).layout.xaxis.type for summary in (astray, near)] == ["log", None]
    assert [scores_astray(summary) for summary in (astray, near)] == [True, False]


def test_a_few_parameters_fewer_are_no_merit(tmp_path: Path) -> None:
    scores = {"lora": [1.0, 1.0], "dora": [1.2, 1.2], "mor": [1.3, 1.3]}
    summary = drawn_from(tmp_path, scores, {"lora": 100_000, "dora": 99_500, "mor": 90_000})
    assert {method.label for method in summary.methods if method.on_front} == {"lora", "mor"}


@pytest.mark.parametrize(("kind", "words"), [("cuda", "allocator of the GPU"), ("process", "the resident memory")])
def test_whose_memory_it_is_is_said(tmp_path: Path, kind: str, words: str) -> None:
    summary = drawn_from(tmp_path, {"lora": [1.0, 1.1]}, {"lora": 1000})
    assert summary.memory_kind == "process"
    assert words in text.about_costs(replace(summary, memory_kind=kind))


def test_the_verdict_knows_which_way_is_better(tmp_path: Path) -> None:
    scores = {"lora": [1.0, 1.1], "dora": [0.5, 0.61], "mor": [1.5, 1.61]}
    summary = drawn_from(tmp_path, scores, dict.fromkeys(scores, 1000))
    found = text.verdict(summary)[1:]
    assert [line.split(" (p")[0] for line in found] == [
        "dora is better than lora by 0.4950", "mor is worse than lora by 0.5050"
    ]  # fmt: skip


def test_one_seed_is_no_test(tmp_path: Path) -> None:
    summary = drawn_from(tmp_path, {"lora": [1.0, None], "dora": [2.0, None]}, {"lora": 1000, "dora": 1000})
    (only,) = text.verdict(summary)
    assert only.startswith("With one seed nothing can be said")


def test_figures_have_the_numbers_of_the_summary(comparison: tuple[Path, Summary, Store]) -> None:
    _, summary, _ = comparison
    means, seeds = figures.scores(summary).data
    intervals = [method.interval for method in summary.methods if method.interval]
    assert means.x == tuple(interval.mean for interval in intervals)
    assert means.error_x.array == tuple(interval.half_width or 0.0 for interval in intervals)
    places = [y for y, name in zip(seeds.y, seeds.customdata, strict=True) if name.startswith("mor")]
    assert len(set(places)) == 3  # equal scores, and still three marks
    assert all(3 < y < 3.5 for y in places)
    trials = figures.rates(summary).data[0]
    assert dict(zip(trials.x, trials.y, strict=True)) == pytest.approx(
        {3.16e-4: 0.1, 1e-3: 0.6, 3.16e-3: 0.1}, abs=1e-3
    )
    assert trials.marker.size == (9, 16, 9)
    bars = figures.cost(summary, "accelerator_memory_max", 2**20, "peak memory, MiB").data[0]
    assert bars.x == (120.0,) * 5


def test_a_loss_is_drawn_as_a_loss(tmp_path: Path) -> None:
    summary = drawn_from(tmp_path, {"lora": [1.0, 1.1]}, {"lora": 1000})
    searched = replace(summary, methods=[replace(summary.methods[0], trials={0.001: Trial(-2.5, None)})])
    assert figures.rates(searched).data[0].y == (2.5,)


def test_each_picture_shows_what_its_name_says(
    comparison: tuple[Path, Summary, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, summary, _ = comparison
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.update({path.name: figure}))
    pictures.draw(tmp_path, summary)
    labels = {name: {axes.get_xlabel() for axes in figure.axes} for name, figure in drawn.items()}
    assert labels["score.png"] == {"accuracy on the evaluation data"}
    assert labels["cost.png"] == {"training, seconds", "peak memory, MiB"}
    assert labels["learning_rates.png"] == {"learning rate"}
    widths = {axes.get_xlabel(): [bar.get_width() for bar in axes.patches] for axes in drawn["cost.png"].axes}
    assert widths == {"training, seconds": [12.5] * 5, "peak memory, MiB": [120.0] * 5}
    ticks = [tick.get_text() for tick in drawn["score.png"].axes[0].get_yticklabels()]
    assert ticks[2] == "dylora\n(1 failed)"
    assert len(ticks) == len(SCORES)
    ahead = [line.get_xydata().tolist() for axes in drawn["pareto.png"].axes for line in axes.lines[:1]]
    assert [len(corners) for corners in ahead] == [2, 3]  # from the one method to the edge, and from edge to edge
    assert ahead[1][0][1] == ahead[0][-1][1] == pytest.approx(0.7567, abs=1e-4)
    points = {line.get_label(): line.get_xydata().tolist() for axes in drawn["pareto.png"].axes for line in axes.lines}
    assert points["lora"] == [[1034.0, pytest.approx(0.71)]]
    assert points["full (front)"] == [[90_034.0, pytest.approx(0.8)]]


def test_close_scores_are_told_with_as_many_digits_as_it_takes(tmp_path: Path) -> None:
    parameters = {"lora": 1000, "dora": 1000}
    close = drawn_from(tmp_path, {"lora": [0.500001, 0.500002], "dora": [0.500003, 0.500004]}, parameters)
    assert [row[4] for row in text.score_table(close)[1]] == ["0.5000010, 0.5000020", "0.5000030, 0.5000040"]
    assert text.test_table(close)[1][0][2] == "+0.0000020"
    same = drawn_from(tmp_path / "same", {"lora": [0.5, 0.5], "dora": [0.5, 0.5]}, parameters)
    assert text.score_table(same)[1][0][4] == "0.5000, 0.5000"


@pytest.mark.parametrize(("allowed", "axis"), [(24, "y"), (9000, "y2")])
def test_a_budget_in_parameters_has_its_own_axis_and_is_drawn_to_the_end(allowed: int, axis: str) -> None:
    history = RankHistory(["a", "b"], [0, 10, 40], np.array([[8.0, 6.0, 6.0], [8.0, 8.0, 8.0]]))
    found = figures.budget(MethodDetails(0, history, [(0, allowed), (10, allowed // 2)]))
    rank, budget = found.data
    assert (rank.x, rank.y) == ((0, 10, 40), (16.0, 14.0, 14.0))
    assert (budget.x, budget.y) == ((0, 10, 40), (allowed, allowed // 2, allowed // 2))
    assert budget.yaxis == axis
    assert ("yaxis2" in found.layout) == (axis == "y2")


def test_what_is_still_to_come_is_said(tmp_path: Path) -> None:
    summary = drawn_from(tmp_path, {"lora": [1.0, 1.1], "dora": [1.0, None]}, {"lora": 1000, "dora": 1000})
    assert summary.waiting == 1
    assert [row[3] for row in text.score_table(summary)[1]] == ["2 of 2", "1 of 2 (1 not trained yet)"]
    assert "has not ended: at least 1 run is" in outcome_lines(summary)[0]
    assert "has not ended" in text.what_was_done(summary)[0]
    assert not text.troubles(summary)
    shares = tuple((v, Share({"name": v.name}, None, None, "")) for v in parse_methods("lora,dora"))
    recipe = Recipe(method={"name": "lora", "r": 2}, output="x")
    searching = summarise(Grid(recipe, shares, (0, 1), (0,), 0.1, 1000, tmp_path / "runs"), {})
    assert [method.waiting for method in searching.methods] == [3 + 2, 3 + 2]  # the final runs follow for certain
    assert text.score_table(searching)[1][0][3] == "0 of 2 (5 not trained yet, its search among them)"
    assert "at least 10 runs are still to be trained" in text.what_was_done(searching)[0]


def test_no_p_is_explained_and_no_interval_is_of_no_width(tmp_path: Path) -> None:
    scores = {"lora": [1.0, 1.1], "dora": [1.0, 1.1], "mor": [1.2, 1.3], "full": [0.9, 0.9]}
    summary = drawn_from(tmp_path, scores, dict.fromkeys(scores, 1000))
    rows = {row[0]: row[3:] for row in text.test_table(summary)[1]}
    assert rows["dora"] == ["-", "-", "-", "-"]
    assert rows["mor"] == ["-", "-", "-", "0.5"]
    assert "-" not in rows["full"]
    equal, shifted = text.verdict(summary)[-2:]
    assert equal == "The same scores as lora's at every seed, so that there is nothing to test: dora."
    assert shifted.startswith("The same difference to lora at every seed")
    assert shifted.endswith(": mor.")
    assert {row[0]: row[2] for row in text.score_table(summary)[1]}["full"] == "-"
    figures.scores(summary)
    one = drawn_from(tmp_path / "one", {"lora": [1.0, None], "dora": [1.0, None]}, dict.fromkeys(scores, 1000))
    assert len(text.verdict(one)) == 1


def test_the_report_says_what_its_scores_are(comparison: tuple[Path, Summary, Store], tmp_path: Path) -> None:
    _, summary, _ = comparison
    assert text.what_was_done(summary)[1] == "Scored by accuracy on the evaluation data; higher is better."
    begun = replace(summary, before={0: 0.25, 1: 0.3})
    assert text.what_was_done(begun)[1].endswith("is better. Before training it is 0.2500, 0.3000, seed by seed.")
    same = replace(summary, before={0: 0.25, 1: 0.25})
    assert text.what_was_done(same)[1].endswith("Before training it is 0.2500.")
    loss = drawn_from(tmp_path, {"lora": [1.0, 1.1]}, {"lora": 1000})
    assert text.what_was_done(loss)[1] == "Scored by nats on the evaluation data; lower is better."
    assert text.about_front(loss).startswith("On the Pareto front: lora. No other method")
    assert text.about_front(replace(loss, methods=[])) == ""
    page = text.markdown(begun, [])
    assert "On the Pareto front: dynamic-dora, full." in page
    assert "run's own process" in page.split("## Time and memory")[1]
    assert "run's own process" not in page.split("## Time and memory")[0]
    assert "allocator of the GPU" in text.about_costs(replace(summary, memory_kind="cuda"))
    written = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert written["method"] == {"name": "lora", "r": 2}
    assert written["train"]["batch_size"] == 32
    assert "output" not in written


def test_scores_before_training_come_from_the_final_runs(comparison: tuple[Path, Summary, Store]) -> None:
    _, summary, store = comparison
    assert summary.before == {}
    shares = tuple((v, Share({"name": v.name}, 1000, 1000, "r=2")) for v in variants())
    grid = Grid(Recipe(method={"name": "lora", "r": 2}, output="x"), shares, (0, 1, 2), (0,), 0.1, 1000, store.folder)
    records = store.records()
    for record in records.values():
        own = record["comparison"]
        own["before"] = 0.1 * own["seed"] + (0.5 if own["phase"] == "search" else 0.2)
    assert summarise(grid, records).before == pytest.approx({0: 0.2, 1: 0.3, 2: 0.4})


def test_the_front_goes_over_the_panels_from_edge_to_edge(tmp_path: Path) -> None:
    scores = {"lora": [1.0, 1.0], "dora": [1.2, 1.2], "mor": [0.8, 0.8], "full": [0.5, 0.5]}
    summary = drawn_from(tmp_path, scores, {"lora": 1000, "dora": 1200, "mor": 1500, "full": 90_000})
    left, right = parameter_panels(summary.methods)
    edges = panel_range(left), panel_range(right)
    first = front_steps(left, None)
    assert first == [(1034.0, 1.0), (1534.0, 0.8), (edges[0][1], 0.8)]
    assert front_steps(right, 0.8) == [(edges[1][0], 0.8), (90_034.0, 0.5), (edges[1][1], 0.5)]
    assert front_steps([method for method in left if method.label == "dora"], None) == []
    drawn = [trace for trace in figures.pareto(summary).data if trace.mode == "lines"]
    assert [tuple(zip(trace.x, trace.y, strict=True)) for trace in drawn] == [
        tuple(first), tuple(front_steps(right, 0.8))
    ]  # fmt: skip
    assert [trace.showlegend for trace in drawn] == [True, False]


def test_marks_tell_methods_apart_without_colour() -> None:
    labels = [f"lora[r={r}]" for r in range(1, 41)]
    shares = tuple((v, Share({"name": "lora"}, None, None, "")) for v in parse_methods(",".join(labels)))
    grid = Grid(Recipe(method={"name": "lora", "r": 2}, output="x"), shares, (0,), (), 0.1, 1000, Path("nowhere"))
    found = list(marks(summarise(grid, {})).values())
    assert len({(mark.colour, mark.symbol) for mark in found}) == len(labels)
    assert len({(mark.colour, mark.marker) for mark in found}) == len(labels)
    assert len({mark.symbol for mark in found[:9]}) == len({mark.marker for mark in found[:9]}) == 9
    by_colour = [(mark.colour, mark.dash) for mark in found[:32]]
    assert len(set(by_colour)) == 32


def test_a_missing_or_bare_run_directory_is_no_error(tmp_path: Path) -> None:
    assert read_details(tmp_path / "gone", 0).history is None
    _run_directory(tmp_path / "bare", moving=False)
    found = read_details(tmp_path / "bare", 3)
    assert (found.seed, found.curve, found.experts, found.kept) == (3, [], {}, [])
    assert found.history is not None
    assert found.history.ranks[:, -1].tolist() == [2.0] * len(MODULES)


def test_a_comparison_without_any_score_still_reports(tmp_path: Path) -> None:
    variant = parse_methods("lora")[0]
    recipe = Recipe(method={"name": "lora", "r": 2}, output="unused")
    grid = Grid(recipe, ((variant, Share({"name": "lora"}, 10, 10, "r=2")),), (0,), (), 0.1, 10, tmp_path / "runs")
    store = Store(grid.runs)
    store.start()
    for run in grid.wanted({}):
        store.write(run, failed(run, "MemoryError", 1.0))
    written = write_report(tmp_path, summarise(grid, store.records()), store)
    assert {path.name for path in written} == {"table.csv", "report.md", "report.html"}
    assert "no scores of plain lora" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def browser(comparison: tuple[Path, Summary, Store], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    out, summary, store = comparison
    path = find_browser()
    write_report(out, summary, store)
    with Browser(path, tmp_path_factory.mktemp("profile")) as found:
        found.open(out / "report.html")
        yield found


def test_every_tab_opens_with_its_figures_drawn(browser: Browser) -> None:
    tabs = browser.value("[...document.querySelectorAll('nav button')].map(tab => tab.textContent)")
    assert tabs == [
        "Scores", "Parameters", "Against lora", "Time and memory", "Learning rates", "Ranks", "Runs"
    ]  # fmt: skip
    for number, name in enumerate(tabs):
        browser.click("nav button", number)
        shown = browser.value("[...document.querySelectorAll('section')].filter(s => !s.hidden).map(s => s.id)")
        assert shown == [f"s{number}"], name
        visible = f"[...document.querySelectorAll('#s{number} .figure')].filter(f => f.offsetParent)"
        browser.until(f"{visible}.every(figure => figure.querySelector('.main-svg'))")
        # Nothing runs over the edge of the page.
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth"), name
    assert browser.errors == []


def test_every_seed_and_the_front_are_drawn(browser: Browser) -> None:
    browser.click("nav button", 0)
    points = browser.value("document.querySelector('#s0 .figure').data.map(trace => trace.x.length)")
    assert points == [5, 14]  # five means, fourteen seeds that ended well
    rows = browser.value("document.querySelector('#s0 .figure').textContent")
    assert "dylora(1 failed)" in rows
    assert "(no usable learning rate)" in rows  # a row of its own all the same
    browser.click("nav button", 1)
    names = browser.value("document.querySelector('#s1 .figure').data.map(trace => trace.name)")
    assert names[0] == "Pareto front"
    assert "full (front)" in names
    assert "lora" in names


def test_the_slider_goes_through_the_ranks(browser: Browser) -> None:
    browser.click("nav button", 5)
    chosen = browser.value("[...document.querySelectorAll('#method option')].map(option => option.textContent)")
    assert chosen == ["dynamic-dora", "dylora", "mor[num_experts=2]"]
    browser.until("document.querySelector('.method:not([hidden]) .slider-container')")
    ranks = "document.querySelector('.method:not([hidden]) .figure').data[0].z.flat().reduce((a, b) => a + b, 0)"
    assert browser.value(ranks) == sum(number % 4 for number in range(len(MODULES)))
    browser.value("document.querySelector('.slider-rail-rect').scrollIntoView({block: 'center'})")
    left, y = browser.value(
        "(() => { const b = document.querySelector('.slider-rail-touch-rect').getBoundingClientRect();"
        "return [b.x, b.y + b.height / 2]; })()"
    )
    browser.press(left + 3, y)
    browser.until(f"{ranks} === {3 * len(MODULES)}")  # before the first change
    assert "optimizer step 0" in browser.value("document.querySelector('.method:not([hidden])').textContent")


def test_methods_show_what_their_run_directories_hold(browser: Browser) -> None:
    browser.click("nav button", 5)
    headings = "[...document.querySelectorAll('.method:not([hidden]) h3')].map(h => h.textContent)"
    select = (
        "(() => { const s = document.getElementById('method'); s.selectedIndex = %d;"
        "s.dispatchEvent(new Event('change')); })()"
    )
    browser.value(select % 0)
    assert browser.value(headings) == ["Rank of every module", "Total rank and budget", "Importance at the end"]
    browser.value(select % 1)
    assert browser.value(headings) == ["Rank of every module", "Score at every rank"]
    browser.value(select % 2)
    assert browser.value(headings) == ["Rank of every module", "Use of the experts"]
    browser.until(
        "[...document.querySelectorAll('.method:not([hidden]) .figure')].every(f => f.querySelector('.main-svg'))"
    )
    use = browser.value("document.querySelectorAll('.method:not([hidden]) .figure')[1].data[0].z")
    assert use == [[0.25, 0.75]] * len(MODULES)  # the last note of the log
    assert browser.errors == []
