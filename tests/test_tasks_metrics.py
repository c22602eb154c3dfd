"""Scores against computations written out by hand."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from ranktune.recipe import DataRecipe
from ranktune.tasks import Data, build_task
from ranktune.tasks.edit_distance import edit_distance

NONE = datasets.Dataset.from_dict({})  # most scores look at predictions and answers alone


def task_of(name: str, labels: list[str] | None = None, rows: dict[str, list] | None = None, **settings):
    rows = rows or {"text": ["a"], "label": [0]}
    split = datasets.Dataset.from_dict(rows)
    return build_task(DataRecipe(**settings), Data(split, split, name, labels, "", ""))


def test_two_classes_by_counting():
    truth, chosen = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 0])
    hit, miss, false, rest = 2, 2, 1, 3  # true positives, false negatives, false positives, true negatives
    scores = task_of("classification", ["no", "yes"]).compute_metrics(EvalPrediction(chosen, truth), NONE)
    assert scores["accuracy"] == pytest.approx((hit + rest) / 8)
    assert scores["f1"] == pytest.approx(2 * hit / (2 * hit + miss + false))
    bottom = math.sqrt((hit + false) * (hit + miss) * (rest + false) * (rest + miss))
    assert scores["matthews"] == pytest.approx((hit * rest - false * miss) / bottom)


def test_three_classes_average_their_f1_with_zero_for_the_one_never_chosen():
    truth, chosen = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 1])
    scores = task_of("classification", ["a", "b", "c"]).compute_metrics(EvalPrediction(chosen, truth), NONE)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 6 + 0) / 3)


def test_one_class_everywhere_has_no_correlation():
    task = task_of("classification", ["no", "yes"])
    assert task.compute_metrics(EvalPrediction(np.zeros(4, int), np.array([0, 1, 0, 1])), NONE)["matthews"] == 0
    assert task.compute_metrics(EvalPrediction(np.zeros(4, int), np.zeros(4, int)), NONE)["matthews"] == 0


def test_correlations_by_their_formulas():
    truth, predicted = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.5, 1.0, 4.0, 4.5])
    x, y = truth - truth.mean(), predicted - predicted.mean()
    scores = task_of("regression").compute_metrics(EvalPrediction(predicted.astype(np.float32), truth), NONE)
    assert scores["pearson"] == pytest.approx((x @ y) / math.sqrt((x @ x) * (y @ y)))
    assert scores["spearman"] == pytest.approx(1 - 6 * (1 + 1 + 0 + 0) / (4 * 15))
    assert scores["mse"] == pytest.approx((0.25 + 1 + 1 + 0.25) / 4)


def test_constant_and_non_finite_predictions():
    task, truth = task_of("regression"), np.array([1.0, 2.0, 3.0])
    constant = task.compute_metrics(EvalPrediction(np.full(3, 2.0), truth), NONE)
    assert (constant["pearson"], constant["spearman"]) == (0, 0)
    broken = task.compute_metrics(EvalPrediction(np.array([1.0, np.nan, 2.0]), truth), NONE)
    assert all(math.isnan(value) for value in broken.values())


def test_language_model_scores_weigh_tokens_not_rows():
    torch.manual_seed(0)
    task = task_of("causal-lm", rows={"text": ["ab", "cde"]})
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    sums = task.preprocess_logits((logits, None), labels)
    assert sums.shape == (2, 2)
    losses = []
    for row, column in [(0, 1), (0, 2), (0, 3), (1, 1)]:
        scores = logits[row, column - 1].double()
        losses.append(float(scores.exp().sum().log() - scores[labels[row, column]]))
    examples = datasets.Dataset.from_dict({"characters": [2, 3]})
    metrics = task.compute_metrics(EvalPrediction(sums.numpy(), labels.numpy()), examples)
    assert metrics["nats_per_token"] == pytest.approx(sum(losses) / 4)
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / 4))
    assert metrics["nats_per_character"] == pytest.approx(sum(losses) / 5)


def test_an_overwhelming_loss_gives_infinite_perplexity_without_a_warning():
    task = task_of("causal-lm", rows={"text": ["ab"]})
    examples = datasets.Dataset.from_dict({"characters": [2]})
    metrics = task.compute_metrics(EvalPrediction(np.array([[8000.0, 2.0]]), np.zeros((1, 3))), examples)
    assert metrics["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("æb", "æb", 0)],
)
def test_edit_distance_known_values(first, second, distance):
    assert edit_distance(first, second) == distance


def test_edit_distance_against_the_recursive_definition():
    def slow(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        replaced = slow(first[1:], second[1:]) + (first[0] != second[0])
        return min(replaced, slow(first[1:], second) + 1, slow(first, second[1:]) + 1)

    generator = np.random.default_rng(0)
    for _ in range(60):
        pair = ["".join(generator.choice(list("abc"), size=generator.integers(0, 6))) for _ in range(2)]
        assert edit_distance(*pair) == slow(*pair)


@pytest.mark.parametrize(
    ("name", "metric", "greater"),
    [
        ("classification", "accuracy", True),
        ("regression", "pearson", True),
        ("causal-lm", "nats_per_token", False),
        ("seq2seq", "exact_match", True),
    ],
)
def test_default_metrics(name, metric, greater):
    rows = {"source_text": ["a"], "target": ["b"]} if name == "seq2seq" else {"text": ["a"], "label": [0]}
    task = task_of(name, ["x", "y"], rows)
    assert (task.name, task.metric, task.greater_is_better) == (name, metric, greater)
    assert task_of("regression", metric="mse").greater_is_better is False
