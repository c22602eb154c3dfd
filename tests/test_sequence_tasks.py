"""The benchmark of sequence tasks: what it chooses on, what it reports, and that nothing is run twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# As Python itself does for a script: its folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import rank_budget
import rank_search
import sequence_tasks
from sequence_tasks import SETTINGS, Case, Study, _powers_of_two, best_rate, rows


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study that has all its runs on file, and must not train."""

    def train(*_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("this run is on file already")

    monkeypatch.setattr(sequence_tasks, "train", train)
    (tmp_path / "g2p").mkdir()
    return Study("g2p", tmp_path)


def put(study: Study, case: Case, scores: dict[int, float | None], metric: str = "exact_match") -> None:
    points = [{"rank": rank, "parameters": 100 * rank, "score": score} for rank, score in scores.items()]
    greater = metric == "exact_match"
    result = {"metric": metric, "greater_is_better": greater, "after": scores[case.rank], "points": points}
    (study.out / f"{case.name}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(("metric", "best"), [("exact_match", 0.01), ("nats_per_character", 0.001)])
def test_the_learning_rate_is_chosen_on_validation_alone(study: Study, metric: str, best: float) -> None:
    for rate, score in {3e-4: 0.55, 0.001: 0.4, 0.003: 0.5, 0.01: 0.7, 0.03: 0.6}.items():
        put(study, Case("lora", 4, rate, 0, "validation"), {4: score}, metric)
        put(study, Case("lora", 4, rate, 0, "test"), {4: 1.1 - score}, metric)  # would choose another one
    assert study.best_learning_rate("lora", 4, 0) == best


@pytest.mark.parametrize(
    ("losses", "tried", "best"),
    [
        ({0.003: 2, 0.01: 1, 0.03: 3}, [0.003, 0.01, 0.03], 0.01),
        ({0.003: 1, 0.01: 2, 0.001: 3}, [0.003, 0.01, 0.001], 0.003),
        ({0.003: 2, 0.01: 3, 0.001: 1.5, 3e-4: 1.6}, [0.003, 0.01, 0.001, 3e-4], 0.001),
        ({0.003: None, 0.01: None, 0.001: 1, 3e-4: 2}, [0.003, 0.01, 0.001, 3e-4], 0.001),
    ],
)
def test_the_grid_goes_on_where_its_best_is_at_an_end(losses, tried, best) -> None:
    seen = []

    def trained(rate: float) -> dict[str, Any]:
        seen.append(rate)
        return {"greater_is_better": False, "after": losses[rate]}

    assert best_rate(trained, (0.003, 0.01)) == best
    assert seen == tried


def test_a_grid_without_end_is_given_up() -> None:
    seen = []
    assert best_rate(lambda rate: seen.append(rate) or {"greater_is_better": True, "after": rate}, (1.0, 3.0)) == max(
        seen
    )
    assert len(seen) == 6


def test_a_run_that_diverged_is_not_chosen(study: Study) -> None:
    for rate, score in {0.001: 0.05, 0.003: 0.1, 0.01: None}.items():
        put(study, Case("lora", 4, rate, 0, "validation"), {4: score})
    assert study.best_learning_rate("lora", 4, 0) == 0.003


def test_a_nested_adapter_has_a_row_for_every_rank(study: Study) -> None:
    for seed, (low, high) in enumerate([(0.1, 0.5), (0.3, 0.7)]):
        put(study, Case("dylora", 2, 0.01, seed, "test"), {1: low, 2: high})
    assert [row.cells() for row in rows(study, "dylora", 2, 0.01, [0, 1])] == [
        ["dylora", "1", "100", "0.01", "0.2000 ± 0.1414", "0.1000, 0.3000"],
        ["dylora", "2", "200", "0.01", "0.6000 ± 0.1414", "0.5000, 0.7000"],
    ]


@pytest.mark.parametrize(("rank", "expected"), [(1, [1]), (2, [1, 2]), (16, [1, 2, 4, 8, 16]), (11, [1, 2, 4, 8, 11])])
def test_ranks_are_powers_of_two_and_the_last_is_the_budget(rank: int, expected: list[int]) -> None:
    assert _powers_of_two(rank) == expected


def test_a_search_for_a_rank_counts_its_runs_and_chooses_on_validation_alone(study: Study, monkeypatch) -> None:
    """LoRA's rate is chosen at the middle rank, and its cost is that of a run a rank; DyLoRA is one run."""
    tried = []

    def run(search: rank_search.Search, arm: rank_search.Arm, case: Case) -> tuple[Path, dict[str, Any]]:
        tried.append(case)
        best = 0.03 if case.split == "test" else 0.01
        after = 0.9 - abs(case.learning_rate - best) + case.rank / 1000 + case.seed / 100
        facts = {"metric": "exact_match", "greater_is_better": True, "before": 0.1, "steps": 5}
        seconds = 100.0 * case.rank if arm is rank_search.SEPARATE else 7.0
        data = {"description": "words"}
        return search.folder, {**facts, "after": after, "cpu_seconds": seconds, "data": data}

    def scores(search: rank_search.Search, arm: rank_search.Arm, case: Case) -> dict[str, dict[int, float]]:
        names = [arm.name] if arm in rank_search.NESTED else [rank_search.CUT.name, rank_search.SVD.name]
        return {name: {b: b + case.seed / 10 for b in search.ranks} for name in names}

    monkeypatch.setattr(rank_search.Search, "run", run)
    monkeypatch.setattr(rank_search.Search, "scores", scores)
    found = rank_search.search(study, [1, 2, 4], [3, 5])
    assert set(found["learning_rates"].values()) == {0.01}
    chosen = [case for case in tried if case.split == "validation"]
    assert {(case.variant, case.rank, case.seed) for case in chosen} == {
        ("lora", 2, 3), ("dylora", 4, 3), ("dylora-all", 4, 3)
    }  # fmt: skip
    assert {case.learning_rate for case in tried if case.split == "test"} == {0.01}
    assert found["cpu_seconds"] == {"lora": [700.0, 700.0], "dylora-frozen": [7.0, 7.0], "dylora-all": [7.0, 7.0]}
    assert found["scores"]["lora"] == {
        b: [pytest.approx(0.88 + b / 1000 + seed / 100) for seed in (3, 5)] for b in (1, 2, 4)
    }
    for name in ("dylora-frozen", "dylora-all", "lora-cut", "lora-svd"):
        assert found["scores"][name] == {b: [b + 0.3, b + 0.5] for b in (1, 2, 4)}


def test_a_rank_for_each_module_is_chosen_on_validation_and_scored_on_test(study: Study, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RANKTUNE_DATA", str(tmp_path))  # named by the recipe, and not looked into
    cuts = rank_budget.Cuts(study, 8, 50, 10)
    monkeypatch.setattr(Study, "data", {split: tmp_path / split for split in ("validation", "test")})
    asked = []

    def train(recipe: Any, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(recipe)
        folder = Path(recipe.output)
        folder.mkdir(parents=True)
        loss = {1e-4: 2.0, 3e-4: 1.0, 1e-3: 3.0}[recipe.train.learning_rate]
        (folder / "metrics.json").write_text(json.dumps({"scores": {"after": {"loss": loss}}}))
        (folder / "recipe.yaml").write_text(f"source: {recipe.data.source}\n")
        return {"metric": "m", "after": loss}

    monkeypatch.setattr(rank_budget, "train", train)
    assert cuts.best_learning_rate("frozen", 0) == 3e-4
    assert {recipe.data.source for recipe in asked} == {str(tmp_path / "validation")}
    copy = cuts._on_test(cuts.run("frozen", 3e-4, 0))
    assert (copy / "recipe.yaml").read_text() == f"source: {tmp_path / 'test'}\n"
    assert len(asked) == 3


def test_splits_that_were_half_written_are_written_again(real_data, monkeypatch, tmp_path) -> None:
    """A study that is stopped while it writes its examples must not be taken up with some of them."""
    monkeypatch.setenv("RANKTUNE_DATA", str(real_data))
    monkeypatch.setitem(SETTINGS, "shakespeare", sequence_tasks.Setting(40, 10, (), (1e-3,)))
    write, done = sequence_tasks._write_splits, []

    def stopped(train: Any, evaluation: Any, folder: Path) -> None:
        if done:
            (folder / "train.jsonl").write_text("")
            raise KeyboardInterrupt
        done.append(write(train, evaluation, folder))

    monkeypatch.setattr(sequence_tasks, "_write_splits", stopped)
    with pytest.raises(KeyboardInterrupt):
        _ = Study("shakespeare", tmp_path).data
    monkeypatch.setattr(sequence_tasks, "_write_splits", write)
    folders = Study("shakespeare", tmp_path).data
    assert {len((folder / "train.jsonl").read_text().splitlines()) for folder in folders.values()} == {40}


def test_equal_parameters_and_examples_that_nothing_was_chosen_on(real_data, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RANKTUNE_DATA", str(real_data))
    monkeypatch.setitem(SETTINGS, "shakespeare", sequence_tasks.Setting(40, 10, (), (1e-3,)))
    study = Study("shakespeare", tmp_path)
    budget = study._parameters("lora", 16)
    for variant in ("dora", "dylora", "mor"):
        r = study.largest_rank(variant, 16)
        assert study._parameters(variant, r) <= 1.01 * budget < study._parameters(variant, r + 1)
    texts = {
        (split, part): set((study.data[split] / f"{part}.jsonl").read_text().splitlines())
        for split in ("validation", "test")
        for part in ("train", "evaluation")
    }
    assert texts["validation", "train"] == texts["test", "train"]
    assert not texts["test", "evaluation"] & (texts["test", "train"] | texts["validation", "evaluation"])
    assert not texts["validation", "evaluation"] & texts["validation", "train"]
    assert [len(part) for part in texts.values()] == [40, 10, 40, 10]
