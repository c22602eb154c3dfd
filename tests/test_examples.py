"""The recipes under `examples/`: each opens with the command that runs it and its result, and each is a good recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranktune.errors import RecipeError
from ranktune.recipe import load_recipe
from ranktune.training import rehearse

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.yaml"))
ON_REAL_DATA = ("g2p", "shakespeare")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_says_how_it_is_run_and_what_came_out(example, monkeypatch, tmp_path):
    header = [line.removeprefix("# ") for line in example.read_text().splitlines() if line.startswith("#")]
    assert f"ranktune train examples/{example.name}" in header[0] or f"examples/{example.name}" in header[0]
    # A comparison has a report of its own.
    assert any(line.startswith("Measured on ") for line in header) or "ranktune compare" in header[0]
    monkeypatch.setenv("RANKTUNE_DATA", str(tmp_path))
    assert load_recipe(example).output == f"runs/{example.stem}"


@pytest.mark.parametrize("name", ON_REAL_DATA)
def test_without_the_data_the_variable_is_asked_for(name, monkeypatch):
    monkeypatch.delenv("RANKTUNE_DATA", raising=False)
    (example,) = [path for path in EXAMPLES if path.stem == name]
    with pytest.raises(RecipeError, match=r"RANKTUNE_DATA is not set.*RANKTUNE_DATA=\.\.\. ranktune"):
        load_recipe(example)


@pytest.mark.parametrize("name", ON_REAL_DATA)
def test_examples_fit_their_models(name, real_data, monkeypatch):
    monkeypatch.setenv("RANKTUNE_DATA", str(real_data))
    (example,) = [path for path in EXAMPLES if path.stem == name]
    plan = rehearse(load_recipe(example, ["data.max_train_examples=50", "data.max_eval_examples=20"]), example)
    assert len(plan.modules) == {"g2p": 16, "shakespeare": 35}[name]
    assert "lm_head" in plan.left_out
