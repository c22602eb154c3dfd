"""The history of ranks replayed from its records, and the pictures made of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ranktune.report import plots
from ranktune.report.plots import draw_run
from ranktune.report.rank_history import budget_figure, importance_figure, rank_history, rank_history_figure
from ranktune.run.directory import RunDirectory

FINAL = {"layer.0.query": 4, "layer.0.key": 6, "layer.1.query": 0}
CHANGES = [
    {"step": 12, "module": "layer.0.query", "old": 6, "new": 5, "score": 0.2},
    {"step": 12, "module": "layer.1.query", "old": 6, "new": 3, "score": 0.1},
    {"step": 20, "module": "layer.0.query", "old": 5, "new": 4, "score": 0.2},
    {"step": 20, "module": "layer.1.query", "old": 3, "new": 0, "score": None},
]
IMPORTANCE = {
    "layer.0.query": {"kept": [0.9, 0.8, 0.7, 0.6], "dropped": [0.2, 0.0]},
    "layer.0.key": {"kept": [0.95, 0.9, 0.8, 0.5, 0.4, 0.3], "dropped": []},
    "layer.1.query": {"kept": [], "dropped": [0.25, 0.2, 0.1, 0.1, 0.05, 0.01]},
}


def test_ranks_at_every_moment_are_those_of_the_records():
    history = rank_history(FINAL, CHANGES, last_step=40)
    assert history.modules == list(FINAL)
    assert history.steps == [0, 12, 20, 40]
    assert np.array_equal(history.ranks, [[6, 5, 4, 4], [6, 6, 6, 6], [6, 3, 0, 0]])


def test_the_budget_curve_steps_down_with_the_ranks():
    history = rank_history(FINAL, CHANGES, last_step=40)
    total, budget = budget_figure(history, [(0, 18), (12, 14), (19, 10)], "title").axes[0].lines
    assert list(total.get_ydata()) == [18, 14, 10, 10]
    assert (list(budget.get_xdata()), list(budget.get_ydata())) == ([0, 12, 19, 40], [18, 14, 10, 10])
    # What is allowed at a step is what was set last, not something on the way to the next.
    assert total.get_drawstyle() == budget.get_drawstyle() == "steps-post"
    assert len(budget_figure(history, [(10, 30_000)], "in parameters").axes[0].lines) == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_the_budget_that_is_drawn_is_the_recorded_one_and_else_the_logged_one(tmp_path, recorded, monkeypatch):
    directory = RunDirectory(tmp_path)
    events = [
        {"event": "start", "method": "dynamic-dora", "model": "tiny", "metric": "accuracy"},
        {"event": "step", "step": 40, "loss": 1.0, "rank_budget": 10},
    ]
    directory.log.write_text("".join(json.dumps(event) + "\n" for event in events))
    ranks = {"final": FINAL, "history": CHANGES, "importance": IMPORTANCE}
    directory.ranks.write_text(json.dumps(ranks | ({"budget": [[0, 18], [20, 10]]} if recorded else {})))
    drawn = []
    monkeypatch.setattr(plots, "budget_figure", lambda h, b, t: drawn.append(b) or budget_figure(h, b, t))
    draw_run(directory)
    assert drawn == [[[0, 18], [20, 10]] if recorded else [(40, 10)]]


def test_the_map_over_time_shows_every_module_between_changes():
    figure = rank_history_figure(rank_history(FINAL, CHANGES, last_step=40), "title")
    mesh = figure.axes[0].collections[0]
    assert np.array_equal(np.asarray(mesh.get_array()).reshape(3, 3), [[6, 5, 4], [6, 6, 6], [6, 3, 0]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(FINAL)


def test_a_change_at_the_very_last_step_is_drawn():
    history = rank_history(FINAL, CHANGES, last_step=20)
    assert history.steps == [0, 12, 20]
    rank_history_figure(history, "title").canvas.draw()


def test_components_are_ranked_by_importance_across_modules():
    kept, dropped = importance_figure(IMPORTANCE, "title").axes[0].lines
    by_place = dict(zip(kept.get_xdata(), kept.get_ydata(), strict=True))
    by_place |= dict(zip(dropped.get_xdata(), dropped.get_ydata(), strict=True))
    assert [by_place[place] for place in sorted(by_place)] == sorted(by_place.values(), reverse=True)
    assert (len(kept.get_xdata()), len(dropped.get_xdata())) == (10, 8)


def test_scores_of_whole_modules_are_called_so():
    figure = importance_figure({"a": {"kept": [0.2], "dropped": []}, "b": {"kept": [0.4], "dropped": []}}, "title")
    assert figure.axes[0].get_xlabel() == "module, by importance"
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.2, 0.4]
    assert list(figure.axes[0].lines[0].get_xdata()) == [2, 1]


def test_the_highest_modules_are_named():
    scores = {"a": 0.2, "b": 0.4, "c": 0.3, "d": 0.1, "e": 0.9}
    importance = {name: {"kept": [score], "dropped": []} for name, score in scores.items()}
    named = importance_figure(importance, "title").axes[0].texts
    assert [(text.get_text(), tuple(text.xy)) for text in named] == [("e", (1, 0.9)), ("b", (2, 0.4)), ("c", (3, 0.3))]
    assert not importance_figure(IMPORTANCE, "title").axes[0].texts


@pytest.mark.parametrize("moved", [True, False])
def test_a_runs_pictures(tmp_path, moved):
    directory = RunDirectory(tmp_path)
    events = [
        {"event": "start", "method": "dynamic-dora", "model": "tiny", "metric": "accuracy"},
        {"event": "step", "step": 40, "loss": 1.0, "rank_budget": 10},
        {"event": "evaluation", "step": 40, "accuracy": 0.5, "loss": 1.0},
    ]
    directory.log.write_text("".join(json.dumps(event) + "\n" for event in events))
    ranks = {"final": FINAL, "history": CHANGES, "importance": IMPORTANCE} if moved else {"final": FINAL, "history": []}
    directory.ranks.write_text(json.dumps(ranks))
    drawn = {path.name for path in draw_run(directory)}
    assert drawn == {path.name for path in tmp_path.glob("*.png")}
    assert {"budget.png", "rank_history.png", "importance.png"} <= drawn if moved else len(drawn) == 3
