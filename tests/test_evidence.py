"""The benchmark on GLUE: its pieces can be run, what is kept of them, and the page that is made of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

# As Python itself does for a script: its folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import glue
import results_page
from evidence import claims
from evidence.claims import Claim, checked, of_glue, of_sequence
from evidence.pieces import PIECES, TASKS
from evidence.results import Result, keep, kept
from ranktune import IncreLoraConfig
from ranktune.compare.methods import parse_methods
from ranktune.compare.statistics import t_interval
from ranktune.compare.summary import MethodSummary, Summary
from ranktune.policy import Layout
from ranktune.recipe.choices import method_config
from ranktune.tasks import load_data
from stepcost import machine

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "glue.py stsb-r8",
    "versions": {"torch": "2.0"},
    "processor": "some processor",
    "device_name": None,
    "cores": 2,
}


def summary_of(scores: dict[str, dict[int, float]], *, greater: bool = True) -> Summary:
    methods = [
        MethodSummary(
            label=label,
            note="r=8",
            rate=0.001,
            trials={},
            edge=False,
            scores=own,
            interval=t_interval(list(own.values())) if own else None,
            troubles=[],
            budget=1000,
            planned=1000,
            adapter=990.0,
            trainable=990.0,
            training=990.0,
            total=5000.0,
            costs={"train_time": 1.5},
            test=None,
            p_corrected=None,
            on_front=False,
            runs={seed: f"{label}-{seed}" for seed in own},
        )
        for label, own in scores.items()
    ]
    return Summary(
        metric="accuracy",
        greater_is_better=greater,
        methods=methods,
        budget=1000,
        seeds=(0, 1),
        search_seeds=1,
        validation=0.1,
        different_data=[],
        machine={},
        packages={},
        model="/somewhere/all-minilm",
        data="some data",
        steps=100,
        memory_kind="",
    )


def result_of(piece: str, scores: dict[str, dict[int, float]], *, greater: bool = True) -> Result:
    return Result(piece, ENVIRONMENT, summary_of(scores, greater=greater))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_reads_its_official_splits(task: str, real_data: Path, tmp_path: Path) -> None:
    piece = PIECES[f"{task}-r8-500"]
    recipe = piece.recipe(str(real_data), str(tmp_path))
    data = load_data(recipe.data, seed=0)
    sizes = {"cola": 1043, "mrpc": 408, "rte": 277, "stsb": 1500, "sst2": 872}
    assert (len(data.train), len(data.evaluation)) == (500, sizes[task])
    classes = {"cola": ["0", "1"], "mrpc": ["0", "1"], "rte": ["entailment", "not_entailment"], "sst2": ["0", "1"]}
    assert (None if data.labels is None else [str(label) for label in data.labels]) == classes.get(task)
    pairs = task in ("mrpc", "rte", "stsb")
    assert ("text_pair" in data.train.column_names) == pairs
    assert all(isinstance(text, str) and text for text in data.train["text"][:50])


@pytest.mark.parametrize("name", PIECES)
def test_every_method_of_every_piece_is_one(name: str) -> None:
    piece = PIECES[name]
    recipe = piece.recipe("data", "out")
    variants = parse_methods(piece.methods)
    assert variants[0].label == "lora"  # what the others are tested against
    for variant in variants:
        method_config(variant.section(recipe.method, name), name, "SEQ_CLS")
    assert recipe.data.max_train_examples == (piece.examples or (11_000 if piece.task == "sst2" else None))
    assert recipe.method["lora_alpha"] == 2 * piece.rank
    assert recipe.method["r"] == piece.rank


def test_the_questions_of_the_benchmark_are_all_there() -> None:
    assert {name for name in PIECES if PIECES[name].part == "main"} == {f"{t}-r{r}" for t in TASKS for r in (2, 8)}
    assert {(p.task, p.examples) for p in PIECES.values() if p.part == "low-resource"} == {
        (task, examples) for task in TASKS for examples in (500, 1000)
    }
    assert all(piece.seeds == 5 for piece in PIECES.values() if piece.part == "low-resource")
    assert all(piece.seeds >= 3 for piece in PIECES.values())


def test_the_parts_of_increlora_that_are_left_out_would_have_acted() -> None:
    """In a run as long as the piece's: a window as long as the time between two rounds leaves no step out."""
    piece = PIECES["ablation-increlora"]
    steps = -(-(piece.examples or 0) // 32) * piece.epochs
    layout = Layout(("one", "two"), torch.tensor([16, 16]))
    acts = {}
    for variant in parse_methods(piece.methods)[1:]:
        policy = IncreLoraConfig(r=piece.rank, **variant.fields).policy(layout, steps)
        acts[variant.label] = (policy.reserve_gate, policy.ramp, sum(map(policy.measures, range(steps))))
    assert len(set(acts.values())) == len(acts) == 4


def test_what_is_kept_comes_back_and_names_no_folder(tmp_path: Path) -> None:
    result = result_of("stsb-r8", {"lora": {0: 0.5, 1: 0.25}, "dora": {}})
    result = replace(result, summary=replace(result.summary, recipe="data:\n  source: /somewhere/glue/STS-B\n"))
    path = keep(result, tmp_path)
    (found,) = kept(tmp_path)
    assert found == replace(result, summary=replace(result.summary, model="all-minilm", recipe=""))
    assert "/somewhere" not in path.read_text()


@pytest.mark.parametrize(
    ("greater", "expected"), [(True, ["1", "1 (0 clear)", "0"]), (False, ["1", "0", "1 (0 clear)"])]
)
def test_a_direction_is_that_of_the_mean_over_common_seeds(greater: bool, expected: list[str]) -> None:
    scores = {"lora": {0: 0.5, 1: 0.6, 2: 9.0}, "dora": {0: 0.9, 1: 0.4}}
    cells = checked(Claim("p", "s", "dora", "lora"), [of_glue(result_of("stsb-r8", scores, greater=greater))])
    assert cells[2:5] == expected
    # 0.4 and -0.2: 12.706 times their standard error of 0.3 on either side.
    low, high = (-3.7119, 3.9119) if greater else (-3.9119, 3.7119)
    assert cells[5] == f"stsb-r8 {0.1 if greater else -0.1:+.4f} ({low:+.4f} to {high:+.4f})"


def measured(name: str, *differences: float) -> claims.Measured:
    """Of dylora to lora, seed by seed."""
    scores = {"lora": dict.fromkeys(range(len(differences)), 0.5)}
    return claims.Measured(name, {**scores, "dylora": {s: 0.5 + d for s, d in enumerate(differences)}}, True)


def test_a_direction_is_clear_where_the_interval_leaves_out_zero() -> None:
    comparisons = [
        measured("gain", 0.2, 0.21, 0.19),
        measured("perhaps", 0.2, 0.01, -0.1),
        measured("hardly", -0.2, -0.01, 0.1),
        measured("loss", -0.2, -0.21, -0.19),
        measured("alone", -0.2),
        measured("equal", 0.0, 0.0, 0.0),
        measured("steps", 0.25, 0.25, 0.25),  # of a few examples; without any spread chance cannot be judged
    ]
    assert checked(Claim("p", "s", "dylora", "lora"), comparisons)[2:5] == ["7", "3 (1 clear)", "3 (1 clear)"]
    assert checked(Claim("p", "s", "dylora", "lora"), comparisons[4:5])[5] == "alone -0.2000"


def test_a_claim_about_little_data_looks_only_there() -> None:
    results = [
        of_glue(result)
        for result in (
            result_of("stsb-r8", {"lora": {0: 0.5}, "increlora": {0: 0.4}}),
            result_of("stsb-r8-500", {"lora": {0: 0.5}, "increlora": {0: 0.7}}),
            result_of("rte-r8-500", {"lora": {0: 0.5}, "increlora": {}}),
            result_of("rte-r8-1000", {"lora": {0: 0.5}}),
        )
    ]
    assert checked(Claim("p", "s", "increlora", "lora"), results)[2:5] == ["2", "1 (0 clear)", "1 (0 clear)"]
    assert checked(Claim("p", "s", "increlora", "lora", few_examples=True), results)[2:] == [
        "1", "1 (0 clear)", "0", "stsb-r8-500 +0.2000",
    ]  # fmt: skip
    assert checked(Claim("p", "s", "mor", "lora"), results)[2:] == ["0", "0", "0", "not measured yet"]


@pytest.mark.parametrize(("metric", "sign"), [("exact_match", 1), ("nats_per_character", -1)])
def test_a_table_of_sequences_counts_too_at_its_largest_rank(metric: str, sign: int) -> None:
    rows = [
        {"method": "dylora", "rank": 16, "scores": [2.5, 2.7]},
        {"method": "lora", "rank": 16, "scores": [2.0, 2.0]},
        {"method": "lora", "rank": 1, "scores": [9.0, 9.0]},
        {"method": "dylora", "rank": 4, "scores": [9.0, 9.0]},
    ]
    measured = of_sequence("g2p", {"metric": metric, "seeds": [0, 1], "rows": rows})
    cells = checked(Claim("p", "s", "dylora", "lora"), [measured])
    assert cells[5].startswith(f"g2p {sign * 0.6:+.4f} (")
    assert checked(Claim("p", "s", "dylora", "lora", few_examples=True), [measured])[2] == "0"


def test_claims_are_of_methods_that_are_compared() -> None:
    compared = {variant.label for piece in PIECES.values() for variant in parse_methods(piece.methods)}
    assert {name for claim in claims.CLAIMS for name in (claim.better, claim.worse)} <= compared


def test_the_page_is_what_the_figures_make_of_it() -> None:
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()


def test_figures_on_the_page_follow_the_files(tmp_path: Path) -> None:
    keep(result_of("stsb-r8", {"lora": {0: 0.51234, 1: 0.2}, "dora": {0: 0.9, 1: 0.8}}), tmp_path)
    (tmp_path / "sequence").mkdir()
    row = {"method": "mor", "rank": 3, "parameters": 1234, "learning_rate": 0.003, "scores": [1.5, 2.5]}
    common = {"environment": ENVIRONMENT, "metric": "nats_per_character", "before": 3.2, "steps": 7, "data": "text"}
    (tmp_path / "sequence" / "shakespeare.json").write_text(json.dumps({**common, "seeds": [0, 1], "rows": [row]}))
    (tmp_path / "rank_search").mkdir()
    search = {
        **common,
        "seeds": [0],
        "learning_rates": {"lora": 0.003, "dylora-frozen": 0.001},
        "scores": {"lora": {"1": [2.0]}, "dylora-frozen": {"1": [2.25]}},
        "cpu_seconds": {"lora": [300.0], "dylora-frozen": [60.0]},
    }
    (tmp_path / "rank_search" / "shakespeare.json").write_text(json.dumps(search))
    page = results_page.page(tmp_path)
    for words in (
        "| DoRA (Liu 2024) | above LoRA at about the same parameters | 1 | 1 (0 clear) | 0 | stsb-r8 +0.4938 (",
        "Learning rates: lora 0.003, dylora-frozen 0.001; lora's is the best at the middle rank",
        "0.5123, 0.2000",
        "`RANKTUNE_DATA=data python benchmarks/glue.py stsb-r8`",
        "| mor | 3 | 1,234 | 0.003 | 2.0000 ± 0.7071 | 1.5000, 2.5000 |",
        "| 1 | 2.0000 | 2.2500 |",
        "dylora-frozen 60 s (5.0 times less than LoRA's runs)",
        "2026-01-02, some processor, 2 cores; torch 2.0.",
    ):
        assert words in page, words
    assert "Not run yet: cola-r2" in page
    assert "stsb-r8," not in page.split("Not run yet: ")[1].splitlines()[0]


def test_the_page_says_what_of_a_piece_is_missing(tmp_path: Path) -> None:
    result = result_of("stsb-r8-500", {"lora": {0: 0.5, 1: 0.25}, "dora": {0: 0.5}})
    half = replace(result.summary.methods[1], waiting=1)
    keep(
        replace(result, summary=replace(result.summary, methods=[result.summary.methods[0], half]), note="Why."),
        tmp_path,
    )
    page = results_page.page(tmp_path)
    assert (
        "Not run yet of this piece: increlora, dynamic-dora, dylora, mor. 2 of its 5 seeds. This comparison has not "
        "ended: at least 1 run is still to be trained. The same command goes on from here. Why."
    ) in page
    assert "1 of 2 (1 not trained yet)" in page
    whole = {variant.label: dict.fromkeys(range(5), 0.5) for variant in parse_methods(PIECES["stsb-r8-500"].methods)}
    everything = result_of("stsb-r8-500", whole)
    keep(replace(everything, summary=replace(everything.summary, seeds=tuple(range(5)))), tmp_path)
    assert "Not run yet of this piece" not in results_page.page(tmp_path)
    assert "of its 5 seeds" not in results_page.page(tmp_path)


def test_a_piece_is_run_as_its_recipe_says(monkeypatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def compare(recipe, file, options, console, *, jobs, report_only):  # noqa: ARG001
        asked.update(recipe=recipe, options=options, jobs=jobs, report_only=report_only)
        return summary_of({"lora": {0: 0.5}}), []

    monkeypatch.setattr(glue, "compare_recipe", compare)
    monkeypatch.setenv("RANKTUNE_DATA", "data")
    monkeypatch.setattr(glue, "keep", lambda result: keep(result, tmp_path))
    given = {"methods": "lora,increlora", "seeds": 2, "jobs": 3, "report_only": True, "note": "why"}
    given |= {"search_seeds": 3, "precision": "bf16"}
    glue.main(["rte-r8-500"], out=tmp_path / "runs", **given)
    assert asked["recipe"] == PIECES["rte-r8-500"].recipe("data", str(tmp_path / "runs" / "rte-r8-500"), "bf16")
    assert asked["recipe"].train.precision == "bf16"
    assert ([v.label for v in asked["options"].methods], asked["options"].seeds) == (["lora", "increlora"], 2)
    assert (asked["options"].search, asked["options"].search_seeds) == (True, 3)
    assert asked["report_only"] is True
    assert (asked["jobs"], asked["options"].out) == (3, tmp_path / "runs" / "rte-r8-500")
    (result,) = kept(tmp_path)
    assert (result.piece, result.note, result.precision) == ("rte-r8-500", "why", "bf16")


@pytest.mark.parametrize(("accelerator", "name"), [("none", None), ("some GPU", "some GPU")])
def test_a_piece_names_the_gpu_that_its_runs_were_on(monkeypatch, accelerator: str, name: str | None) -> None:
    """Also where another machine only reports them."""
    summary = replace(summary_of({"lora": {0: 0.5}}), machine={"accelerator": accelerator})
    monkeypatch.setattr(glue, "compare_recipe", lambda *_, **__: (summary, []))
    monkeypatch.setenv("RANKTUNE_DATA", "data")
    options = glue.Options(methods=[], seeds=1, out=Path("out"))
    result = glue.run(PIECES["rte-r8"], options, "fp16", 1, True, "")
    assert result.environment["device_name"] == name
    assert (name or f"{result.environment['processor']}, ") in results_page._where(result.environment)


def test_the_command_on_record_leaves_out_where_files_went(monkeypatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "/a/b/glue.py",
            "--jobs",
            "2",
            "--report-only",
            "stsb-r8",
            "--out",
            "/home/me/x",
            "--out=/y",
            "--methods",
            "a[b=1]",
            "--note",
            "why",
        ],
    )
    assert machine.Machine().describe()["command"] == "glue.py stsb-r8 --methods 'a[b=1]'"
