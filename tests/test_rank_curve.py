"""`ranktune evaluate --ranks` and `ranktune truncate` on a run of dylora: the curve and what is cut from it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import ranktune
from ranktune.errors import RecipeError
from ranktune.evaluation import rebuilt
from ranktune.rank_curve import RankCurve, RankPoint, rank_curve
from ranktune.report.rank_curve import drawn_figure, rank_curve_figure
from ranktune.run.display import SilentDisplay
from ranktune.truncation import share_of, truncate
from tests.command_line import command
from tests.tiny import LINEAR_MODULES, NESTED_RANK, write_everything


def curve_of(score, greater=True):
    """The ranks 1, 2, 4, 8 with these scores."""
    points = (RankPoint(2**place, 100, 1000, {"loss": 0.5, "score": value}) for place, value in enumerate(score))
    return RankCurve("score", greater, "evaluation", True, tuple(points))


@pytest.mark.parametrize(
    ("scores", "greater", "share", "best", "smallest"),
    [
        ([0.80, 0.895, 0.90, 0.88], True, 0.01, 4, 2),
        ([0.80, 0.895, 0.90, 0.88], True, 0.0, 4, 4),
        ([0.80, 0.895, 0.90, 0.88], True, 0.2, 4, 1),
        ([0.9, 0.9, 0.9, 0.9], True, 0.0, 1, 1),
        ([2.0, 1.515, 1.5, 1.6], False, 0.01, 4, 2),
        ([2.0, 1.52, 1.5, 1.6], False, 0.01, 4, 4),
        ([-0.5, -0.101, -0.1, -0.2], True, 0.02, 4, 2),
        ([-0.5, -0.103, -0.1, -0.2], True, 0.02, 4, 4),
    ],
)
def test_the_smallest_rank_that_is_good_enough(scores, greater, share, best, smallest):
    """Shares are of the best score's size, whichever sign it has."""
    curve = curve_of(scores, greater)
    assert curve.best.rank == best
    assert curve.smallest_within(share).rank == smallest


def test_the_curve_is_what_each_rank_scores_alone(nested_run):
    """Every point against a model of stock PEFT with the leading components, and its own parameter count."""
    out = nested_run / "out"
    done = command("evaluate", out, "--ranks", "all")
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((out / "rank_curve.csv").read_text().splitlines()))
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4]
    assert (out / "rank_curve.png").stat().st_size > 5000
    recorded = json.loads((out / "metrics.json").read_text())
    assert float(rows[-1]["loss"]) == recorded["scores"]["after"]["loss"]
    assert int(rows[-1]["parameters"]) == recorded["active_params"]
    counts = [int(row["parameters"]) * NESTED_RANK for row in rows]
    assert counts == [recorded["active_params"] * b for b in (1, 2, 3, 4)]
    assert len({row["loss"] for row in rows}) == NESTED_RANK
    for row in rows:
        assert f"{float(row['loss']):.4f}" in done.output

    with rebuilt(out, SilentDisplay()) as scorer:
        full = scorer.model
        for b in (1, 3):
            ranktune.set_rank(full, b)
            assert scorer.scores()["loss"] == float(rows[b - 1]["loss"])


def test_ranks_may_be_chosen_and_the_run_is_left_alone(nested_run, tmp_path):
    out = shutil.copytree(nested_run / "out", tmp_path / "out")
    for name in ("rank_curve.csv", "rank_curve.png"):
        (out / name).unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = command("evaluate", out, "--ranks", "4, 1,4", "--json", "--split", "train")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [point["rank"] for point in result["points"]] == [1, 4]
    assert result["metric"] == "accuracy"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("words", ["", "1;2", "1,,2", "a", "-1", "1.5", "all,1", "²"])
def test_what_is_no_list_of_ranks_is_refused(nested_run, words):
    done = command("evaluate", nested_run / "out", "--ranks", words)
    assert done.exit_code == 2
    assert "write 'all', or ranks with commas" in done.stderr


@pytest.mark.parametrize("arguments", [("evaluate", "--ranks", "1,9"), ("truncate", "--rank", "9")], ids=str)
def test_a_rank_that_was_not_trained_is_refused(nested_run, arguments):
    name, *options = arguments
    done = command(name, nested_run / "out", *options)
    assert done.exit_code == 2
    assert "rank 9 is not among those that adapter 'default' was trained at: [1, 2, 3, 4]" in done.stderr


def test_truncating_writes_a_plain_lora_with_the_head(nested_run, tmp_path):
    folder = tmp_path / "small"
    done = command("truncate", nested_run / "out", "--rank", 2, "--out", folder)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Rank 2: ")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in tensors) == LINEAR_MODULES
    assert all(t.shape[0] == 2 for name, t in tensors.items() if "lora_A" in name)

    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(nested_run / "model")
    plain = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.randint(2, 18, (3, 9), generator=torch.Generator().manual_seed(0))
    with rebuilt(nested_run / "out", SilentDisplay()) as scorer, torch.no_grad():
        ranktune.set_rank(scorer.model, 2)
        expected = scorer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_truncating_by_quality_takes_the_smallest_good_rank(nested_run, tmp_path):
    curve = rank_curve(nested_run / "out", SilentDisplay())
    for within, share in (("0%", 0.0), ("50%", 0.5)):
        wanted = curve.smallest_within(share)
        result = truncate(nested_run / "out", SilentDisplay(), within=within, out=tmp_path / within[0])
        assert result.rank == wanted.rank
        assert result.parameters == wanted.parameters
        assert result.written.exported.nbytes == wanted.adapter_bytes
        assert result.curve is not None
        assert result.curve.points == curve.points
    assert result.rank == 1


def test_truncating_says_that_a_chosen_score_is_optimistic(nested_run, tmp_path):
    out = shutil.copytree(nested_run / "out", tmp_path / "out")
    done = command("truncate", out, "--within", "2.5 %")
    assert done.exit_code == 0, done.output
    assert "chosen on the evaluation split out of 4" in done.output
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert folder.name.startswith("out-rank")
    again = command("truncate", out, "--rank", folder.name[-1])
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("options", [(), ("--rank", "2", "--within", "1%")], ids=str)
def test_exactly_one_way_to_choose_is_asked_for(nested_run, options):
    done = command("truncate", nested_run / "out", *options)
    assert done.exit_code == 2
    assert "give one of --rank" in done.stderr


@pytest.mark.parametrize("text", ["1", "0.01", "", "%", "-1%", "100%", "1e1%", "one%"])
def test_what_is_no_percentage_is_refused(text):
    with pytest.raises(RecipeError, match="write a percentage"):
        share_of(text)


def test_percentages():
    assert share_of("1%") == 0.01
    assert share_of(" 0.5 % ") == 0.005


def test_a_run_of_another_method_has_no_curve(tmp_path):
    write_everything(tmp_path)
    assert command("train", tmp_path / "recipe.yaml", "--quiet").exit_code == 0
    for arguments in (("evaluate", "--ranks", "all"), ("truncate", "--rank", "1")):
        done = command(arguments[0], tmp_path / "out", *arguments[1:])
        assert done.exit_code == 2
        assert "is of method 'lora': it was not trained to work at other ranks" in done.stderr
        assert "`ranktune squeeze`" in done.stderr
        assert "`ranktune export --svd-rank`" in done.stderr


def test_a_run_tells_which_ranks_it_trained(nested_run):
    """From seed and step alone, as the controller drew them; the picture shows nothing else."""
    out = nested_run / "out"
    metrics, ranks = (json.loads((out / name).read_text()) for name in ("metrics.json", "ranks.json"))
    assert metrics["total_rank"] == NESTED_RANK * LINEAR_MODULES
    assert set(ranks["final"].values()) == {NESTED_RANK}
    assert ranks["history"] == []
    assert sum(ranks["drawn"].values()) == metrics["steps"] == 60
    policy = ranktune.DyLoraConfig(r=NESTED_RANK).policy(ranktune.policy.Layout((), torch.zeros(0)), 60)
    expected = [policy.draw(3, step) for step in range(60)]
    assert ranks["drawn"] == {str(b): expected.count(b) for b in sorted(set(expected))}
    pictures = {path.name for path in out.glob("*.png")} - {"rank_curve.png"}
    assert pictures == {"loss.png", "metric.png", "ranks.png", "ranks_drawn.png"}
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert not [event for event in steps if "rank_budget" in event]


def test_an_overwritten_run_takes_its_curve_along(nested_run, tmp_path):
    shutil.copytree(nested_run, tmp_path, dirs_exist_ok=True)
    out: Path = tmp_path / "out"
    (out / "rank_curve.csv").write_text("old")
    done = command("train", tmp_path / "recipe.yaml", f"output={out}", "method.name=lora", "--overwrite", "--quiet")
    assert done.exit_code == 0, done.output
    assert not [name for name in ("rank_curve.csv", "rank_curve.png", "ranks_drawn.png") if (out / name).exists()]


def test_pictures_label_every_rank_they_have_room_for():
    figure = rank_curve_figure(curve_of([0.1, 0.4, 0.5, 0.55]), "title")
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["8", "4", "2", "1"]
    many = RankCurve("score", True, "evaluation", True, tuple(
        RankPoint(b, b, b, {"score": b / 64}) for b in range(1, 65)
    ))  # fmt: skip
    figure = rank_curve_figure(many, "title")
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[0] == "64"
    assert len(labels) <= 16

    axes = drawn_figure({1: 5, 2: 3, 8: 9}, "title").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [5, 3, 9]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "8"]
