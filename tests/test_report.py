"""Pictures and tables: where each rank is put, what is drawn, and that nothing overlaps."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console

from ranktune.errors import RecipeError
from ranktune.report.curves import loss_figure, metric_figure
from ranktune.report.plots import draw_run
from ranktune.report.rank_map import rank_grid, rank_map_figure
from ranktune.report.tables import number, size, summary_table
from ranktune.run.directory import RunDirectory

BERT_KINDS = ("attention.self.query", "attention.output.dense", "intermediate.dense")
BERT = {
    f"bert.encoder.layer.{layer}.{kind}": 10 * layer + row for layer in range(12) for row, kind in enumerate(BERT_KINDS)
}


def texts_of_axis(figure: Figure, axis: str) -> list[Text]:
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels() if axis == "x" else figure.axes[0].get_yticklabels()
    return [label for label in labels if label.get_text()]


def assert_no_overlap(texts: list[Text]) -> None:
    boxes = [text.get_window_extent() for text in texts]
    for first, second in pairwise(boxes):
        assert not first.overlaps(second)


def test_modules_are_placed_by_layer_and_kind() -> None:
    grid = rank_grid({**BERT, "bert.pooler.dense": 99})
    assert grid.columns == [*map(str, range(12)), "none"]
    assert grid.rows == [*BERT_KINDS, "bert.pooler.dense"]
    for layer in range(12):
        assert grid.ranks[:3, layer].tolist() == [10 * layer, 10 * layer + 1, 10 * layer + 2]
    assert grid.ranks[3, 12] == 99
    assert np.isnan(grid.ranks[3, :12]).all()
    assert np.isnan(grid.ranks[:3, 12]).all()


def test_layers_are_sorted_as_numbers_and_may_be_missing() -> None:
    grid = rank_grid({"model.layers.10.mlp.up": 1, "model.layers.9.mlp.up": 2, "model.layers.2.self_attn.q": 3})
    assert grid.columns == ["2", "9", "10"]
    assert grid.rows == ["mlp.up", "self_attn.q"]
    np.testing.assert_array_equal(grid.ranks, [[np.nan, 2, 1], [3, np.nan, np.nan]])


def test_two_stacks_do_not_share_rows() -> None:
    ranks = {f"model.{stack}.layers.{layer}.fc1": 8 for stack in ("encoder", "decoder") for layer in range(2)}
    grid = rank_grid(ranks)
    assert grid.rows == ["encoder fc1", "decoder fc1"]
    assert grid.ranks.shape == (2, 2)
    assert not np.isnan(grid.ranks).any()


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("transformer.h.3.attn.c_attn", "attn.c_attn", "3"),
        ("model.layers.1.mlp.experts.7.w1", "mlp.experts.7.w1", "1"),
        ("0.linear", "linear", "0"),
        ("fc2.proj", "fc2.proj", "none"),
        ("encoder.conv1d.weight_proj", "encoder.conv1d.weight_proj", "none"),
        ("lm_head", "lm_head", "none"),
    ],
)
def test_names_of_many_architectures(name: str, row: str, column: str) -> None:
    grid = rank_grid({name: 4})
    assert (grid.rows, grid.columns) == ([row], [column])


@pytest.mark.parametrize(
    "ranks",
    [
        dict.fromkeys(BERT, 8),
        BERT,
        {"lm_head": 0},
        {f"model.layers.{layer}.mlp.experts.{expert}.w": 3 for layer in range(80) for expert in range(64)},
    ],
    ids=["constant", "varied", "one module of rank 0", "many"],
)
def test_rank_maps_have_readable_labels(ranks: dict[str, int]) -> None:
    figure = rank_map_figure(ranks, "Rank of each module")
    for axis in ("x", "y"):
        assert_no_overlap(texts_of_axis(figure, axis))
    image = figure.axes[0].images[0]
    # A constant map is coloured by its height above zero, not washed out by its own range.
    assert image.norm.vmin == 0
    assert image.norm.vmax >= max(*ranks.values(), 1)
    written = [int(text.get_text()) for text in figure.axes[0].texts]
    assert sorted(written) == (sorted(ranks.values()) if len(ranks) <= 600 else [])


def test_long_titles_stay_inside_the_picture() -> None:
    figure = rank_map_figure({"fc1": 3}, "Rank of each module: dynamic-dora on a-model-with-a-very-long-name-indeed")
    figure.draw_without_rendering()
    title = next(text for text in figure.axes[0].get_children() if isinstance(text, Text) and text.get_text())
    assert title.get_window_extent().x1 <= figure.bbox.x1


def test_curves_follow_the_log() -> None:
    events = [
        {"event": "evaluation", "step": 0, "loss": 2.0, "accuracy": 0.1},
        {"event": "step", "step": 1, "loss": 1.9},
        {"event": "step", "step": 10, "loss": None},
        {"event": "step", "step": 20, "loss": 1.0},
        {"event": "evaluation", "step": 20, "loss": 1.1, "accuracy": 0.7},
        {"event": "end", "step": 20},
    ]
    training, evaluation = loss_figure(events, "Loss").axes[0].lines
    assert training.get_xydata().tolist() == [[1, 1.9], [20, 1.0]]
    assert evaluation.get_xydata().tolist() == [[0, 2.0], [20, 1.1]]
    assert training.get_color() != evaluation.get_color()
    axes = metric_figure(events, "accuracy", "Accuracy").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.1], [20, 0.7]]
    assert [text.get_text() for text in axes.texts] == ["0.1", "0.7"]


def test_curves_of_an_empty_log_say_so() -> None:
    assert "nothing was logged" in [text.get_text() for text in loss_figure([], "Loss").axes[0].texts]
    lone = metric_figure([{"event": "evaluation", "step": 3, "f1": 0.5}], "f1", "F1").axes[0]
    assert lone.lines[0].get_marker() == "o"
    assert [text.get_text() for text in lone.texts] == ["0.5"]


def test_pictures_are_drawn_from_the_directory_alone(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"event": "start", "method": "dora", "model": "m", "metric": "f1"}\n'
        '{"event": "evaluation", "step": 0, "f1": 0.25, "loss": 1.0}\n'
    )
    (tmp_path / "ranks.json").write_text(json.dumps({"final": BERT, "history": []}))
    paths = draw_run(RunDirectory(tmp_path))
    assert [path.name for path in paths] == ["loss.png", "metric.png", "ranks.png"]
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.02  # something is drawn
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(
        ["log.jsonl", "ranks.json", *(path.name for path in paths)]
    )
    (tmp_path / "ranks.json").write_text("{")
    with pytest.raises(RecipeError, match=r"ranks\.json is not JSON"):
        draw_run(RunDirectory(tmp_path))


def test_summary_shows_counts_and_shares() -> None:
    metrics = {
        "method": "dora", "model": "m", "metric": "character_error_rate", "before": 0.5, "after": None,
        "trainable_params": 2_500, "active_params": 2_000, "total_params": 100_000, "total_rank": 16,
        "seconds": 12.34, "samples_per_second": 98.7, "peak_memory_mb": 1234.5, "peak_memory_kind": "cuda",
        "adapter_bytes": 3 * 2**20,
    }  # fmt: skip
    page = io.StringIO()
    Console(file=page, width=100).print(summary_table(metrics))
    shown = page.getvalue()
    for words in (
        "character error rate before",
        "0.5000",
        "2,500",
        "2,000",
        "2.50%",
        "12.3 s",
        "on the GPU",
        "3.0 MiB",
    ):
        assert words in shown
    assert (number(None), number(0.12345), size(2048)) == ("-", "0.1235", "2.0 KiB")
