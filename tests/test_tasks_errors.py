"""Every refusal of the data section: what it says, which field it names, what it suggests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest

from ranktune.errors import DataError, RanktuneError, RecipeError
from ranktune.recipe import DataRecipe
from ranktune.tasks import build_task, check_source, load_data

GOOD = "text,label\n" + "".join(f"text {row},{'yes' if row % 2 else 'no'}\n" for row in range(10))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def good(tmp_path) -> Path:
    file = tmp_path / "reviews.csv"
    file.write_text(GOOD)
    return file


def refuse(error: type[RanktuneError], *parts: str, early: bool = True, **settings) -> None:
    """Expect the error with every part in its message; `early`: already from the checks that load nothing."""
    recipe = DataRecipe(**settings)
    if not early:
        check_source(recipe)
    with pytest.raises(error) as caught:
        check_source(recipe) if early else load_data(recipe, seed=0)
    for part in parts:
        assert part in str(caught.value)


def test_words_are_checked_with_a_suggestion(good):
    refuse(RecipeError, "data.task", "'clasification'", "Did you mean 'classification'?", task="clasification")
    refuse(RecipeError, "data.metric", "'acuracy'", "Did you mean 'accuracy'?", metric="acuracy")
    refuse(RecipeError, "data.metric", "'pearson'", "'classification'", task="classification", metric="pearson")
    refuse(
        RecipeError,
        "data.columns",
        "'txt'",
        "Did you mean 'text'?",
        source=str(good),
        columns={"txt": "text"},
    )
    refuse(RecipeError, "data.columns", "'target'", source=str(good), task="regression", columns={"target": "label"})


def test_a_metric_of_another_task_than_the_guessed_one(good):
    refuse(
        RecipeError, "data.metric", "'spearman'", "'classification'", early=False, source=str(good), metric="spearman"
    )


def test_build_task_refuses_a_foreign_metric_too(good):
    loaded = load_data(DataRecipe(source=str(good)), seed=0)
    with pytest.raises(RecipeError, match=r"data\.metric"):
        build_task(DataRecipe(source=str(good), metric="mse"), loaded)


def test_a_missing_file_names_its_neighbour(good):
    refuse(
        DataError,
        "data.source",
        "does not exist",
        "Did you mean 'reviews.csv'?",
        source=str(good.parent / "review.csv"),
    )
    refuse(DataError, "neither does its folder", source=str(good.parent / "nowhere" / "a.csv"))
    refuse(DataError, "data.source", "does not exist", source="reviewz.csv")
    refuse(DataError, "data.evaluation", "Did you mean 'reviews.csv'?", source=str(good), evaluation="review.csv")
    refuse(DataError, "data.train", source=str(good), train="train.csv")
    refuse(DataError, "training file too", source=str(good), evaluation="reviews.csv")


def test_a_misspelt_embedded_source_is_not_looked_up_on_the_hub():
    refuse(DataError, "Did you mean 'stdlib-docstrings'?", source="stdlib-docstring")


def test_the_hub_out_of_reach_is_a_clear_error():
    refuse(DataError, "data.source", "'someone/something'", "hub", early=False, source="someone/something")


def test_hub_settings_are_refused_for_local_files(good):
    refuse(RecipeError, "data.config", source=str(good), config="mrpc")
    refuse(RecipeError, "data.revision", source=str(good), revision="main")


@pytest.fixture
def hub(monkeypatch) -> list:
    """A hub that has one data set, and remembers what it was asked for."""
    rows = {
        name: [{"text": f"{name} {row}", "label": row % 2} for row in range(4)] for name in ("train", "test", "extra")
    }
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.DatasetDict({name: datasets.Dataset.from_list(split) for name, split in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_splits_of_the_hub(hub):
    settings = {"source": "someone/data.v2", "config": "small", "revision": "abc"}
    data = load_data(DataRecipe(**settings), seed=0)
    assert hub == [(("someone/data.v2", "small"), {"revision": "abc"})]
    assert (data.train["text"][0], data.evaluation["text"][0]) == ("train 0", "test 0")
    chosen = load_data(DataRecipe(**settings, train="extra", evaluation="train"), seed=0)
    assert (chosen.train["text"][0], chosen.evaluation["text"][0]) == ("extra 0", "train 0")


def test_splits_that_the_hub_does_not_have(hub):
    source = {"source": "someone/something", "early": False}
    refuse(DataError, "data.train", "'extr'", "Did you mean 'extra'?", "train, test, extra", train="extr", **source)
    refuse(DataError, "data.evaluation", "no split 'validation'", evaluation="validation", **source)
    refuse(DataError, "data.evaluation", "training split too", evaluation="train", **source)
    assert len(hub) == 3


def test_unknown_formats_and_folders_without_data(tmp_path):
    (tmp_path / "reviews.xlsx").write_bytes(b"")
    refuse(DataError, "'.xlsx'", ".csv", source=str(tmp_path / "reviews.xlsx"))
    (tmp_path / "empty").mkdir()
    refuse(DataError, "holds no data file", source=str(tmp_path / "empty"))


def test_folders_whose_splits_are_not_obvious(tmp_path):
    for name in ("part1.csv", "part2.csv"):
        (tmp_path / name).write_text(GOOD)
    refuse(DataError, "data.train", "part1.csv, part2.csv", source=str(tmp_path))
    refuse(DataError, "data.train", "Did you mean 'part1.csv'?", source=str(tmp_path), train="prt1.csv")
    refuse(DataError, "data.evaluation", "'part3'", source=str(tmp_path), train="part1", evaluation="part3")
    refuse(
        DataError, "data.evaluation", "training split too", source=str(tmp_path), train="part1", evaluation="part1.csv"
    )
    (tmp_path / "part1.jsonl").write_text("{}")
    refuse(DataError, "several files could be the split 'part1'", source=str(tmp_path), train="part1")


@pytest.mark.parametrize(
    ("content", "settings", "parts"),
    [
        ("", {}, ["is empty"]),
        ("text,text\na,b\n", {}, ["two columns named 'text'", "data.header: false"]),
        ("text,label\na,b,c\n", {}, ["row 1", "3 cells", "data.delimiter"]),
        (GOOD, {"columns": {"text": "txt"}}, ["data.columns.text", "'txt'", "Did you mean 'text'?", "text, label"]),
        (GOOD, {"columns": {"text": "label", "label": "label"}}, ["one column plays two roles"]),
        (GOOD, {"task": "seq2seq"}, ["'seq2seq'", "source_text + target", "text, label"]),
        (GOOD, {"delimiter": "::"}, ["data.delimiter", "'::'"]),
    ],
)
def test_csv_headers_are_checked_before_anything_is_loaded(content, settings, parts, tmp_path):
    (tmp_path / "some.csv").write_text(content)
    refuse(DataError, *parts, source=str(tmp_path / "some.csv"), **settings)


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        ([["a", "x"], ["b", "y"], ["", "x"], ["c", "y"]], {}, ["row 3 of the train split", "empty text", "'text'"]),
        ([["a", "x"], [" ", "y"], ["b", "x"], ["c", "y"]], {}, ["row 2 of the train split", "empty text"]),
        ([["a", "x"], [None, "y"], ["b", "x"], ["c", "y"]], {}, ["row 2", "nothing in the column 'text'"]),
        ([["a", "x"], ["b", None], ["c", "x"], ["d", "y"]], {"task": "classification"}, ["row 2", "no label"]),
        ([["a", "x"], ["b", ""], ["c", "x"], ["d", "y"]], {"task": "classification"}, ["row 2", "no label"]),
        ([[1, "x"], [2, "y"], [3, "x"], [4, "y"]], {}, ["row 1", "int", "'text'", "data.columns"]),
        ([["a", "x"], ["b", "x"], ["c", "x"]], {}, ["needs two classes", "['x']"]),
        ([["a", 0.5], ["b", 1.5]], {"task": "classification"}, ["row 1", "0.5", "data.task: regression"]),
        ([["a", "0.5"], ["b", "high"]], {"task": "regression"}, ["row 2", "'high'", "needs numbers"]),
        ([["a", 0.5], ["b", None]], {"task": "regression"}, ["row 2", "None"]),
        ([["a", "0.5"], ["b", "nan"]], {"task": "regression"}, ["row 2", "'nan'"]),
        ([["a", True], ["b", False]], {"task": "regression"}, ["row 1", "True"]),
        ([["a", ["x"]], ["b", ["y"]]], {"task": "classification"}, ["row 1", "list"]),
        ([["a", "x"], ["b", "y"]] * 2, {"labels": ["x", "z"]}, ["data.labels", "'y'", "x, z"]),
        ([["a", "x"], ["b", "y"]] * 2, {"labels": ["x", "y", "x"]}, ["data.labels", "twice"]),
        ([["a", 1.5], ["b", 2.5]], {"labels": ["x", "y"]}, ["data.labels", "regression"]),
        ([["a", "x"], ["a", "y"]] * 3, {}, ["data.evaluation_fraction", "1 different texts"]),
        ([["a", f"{row}"] for row in range(300)], {}, ["data.task", "'label'", "many different values"]),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, settings, parts, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    refuse(DataError, *parts, early=False, source=str(file), **settings)


def test_a_class_that_only_the_evaluation_has(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "test.csv").write_text(GOOD + "more,yess\n")
    refuse(
        DataError,
        "row 11 of the evaluation split",
        "'yess'",
        "Did you mean 'yes'?",
        early=False,
        source=str(tmp_path),
    )
    data = load_data(DataRecipe(source=str(tmp_path), labels=["no", "yes", "yess"]), seed=0)
    assert data.evaluation["label"][10] == 2


def test_an_evaluation_file_without_the_columns(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 2)
    (tmp_path / "test.jsonl").write_text('{"text": "a", "labels": "x"}\n')
    refuse(
        DataError,
        "'label' in the evaluation split",
        "Did you mean 'labels'?",
        early=False,
        source=str(tmp_path),
    )


def test_hidden_labels_of_the_hub_are_missing_labels(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    for name, labels in (("train", [0, 1]), ("test", [-1, -1])):
        rows = datasets.Dataset.from_dict({"text": ["s", "t"], "label": labels}, features=features)
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    refuse(
        DataError,
        "row 1 of the evaluation split has no label",
        early=False,
        source=str(tmp_path),
        task="classification",
    )


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"title": "a", "body": "b"}, ["data.task", "none of the usual ones", "title, body"]),
        ({"prompt": "a", "completion": "b", "text": "c", "label": 1}, ["classification and causal-lm"]),
    ],
)
def test_a_task_that_is_not_obvious_is_asked_for(row, parts, tmp_path):
    (tmp_path / "some.jsonl").write_text((json.dumps(row) + "\n") * 4)
    refuse(DataError, *parts, early=False, source=str(tmp_path / "some.jsonl"))


def test_files_that_cannot_be_parsed(tmp_path):
    (tmp_path / "ragged.csv").write_text("text,label\na,b\nc,d,e\n")
    refuse(DataError, "'ragged.csv'", "line 3", early=False, source=str(tmp_path / "ragged.csv"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    refuse(DataError, "'broken.jsonl'", "json", early=False, source=str(tmp_path / "broken.jsonl"))
    (tmp_path / "latin.csv").write_bytes("text,label\né,b\n".encode("latin-1"))
    refuse(DataError, "'latin.csv'", "utf-8", source=str(tmp_path / "latin.csv"))
    (tmp_path / "fake.parquet").write_bytes(b"not parquet")
    refuse(DataError, "'fake.parquet'", early=False, source=str(tmp_path / "fake.parquet"))


def test_an_empty_split(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "dev.csv").write_text("text,label\n")
    refuse(DataError, "'dev.csv' has a header but no examples", source=str(tmp_path))


def test_messages_hold_no_unfinished_placeholders(good):
    with pytest.raises(DataError) as caught:
        check_source(DataRecipe(source=str(good), columns={"text": "zzz"}))
    assert not re.search(r"[{}]", str(caught.value))


def test_a_class_that_falls_into_the_evaluation_split_alone(tmp_path):
    """Split off by hash: with one example each, whichever is held out is of a class that training does not have."""
    path = tmp_path / "two.csv"
    path.write_text("text,label\nfine words,good\nother words,bad\n")
    settings = {"source": str(path), "task": "classification"}
    refuse(DataError, "data.evaluation_fraction", "fell into the evaluation split", early=False, **settings)
    loaded = load_data(DataRecipe(**settings, labels=["bad", "good"]), seed=0)
    assert (len(loaded.train), len(loaded.evaluation)) == (1, 1)


@pytest.mark.parametrize("extension", ["tsv", "csv"])
def test_quotation_marks_that_are_text_are_told_from_torn_files(tmp_path, extension):
    """As in GLUE's STS-B: a mark that nothing closes swallows cells, and a later row has too many."""
    cell = "\t" if extension == "tsv" else ","
    rows = [["sentence1", "sentence2", "score"], *[["one", "two", "0.5"]] * 20]
    rows += [["one", '"two', "0.5"], ['three"', "four", "1.0"]]
    file = tmp_path / f"train.{extension}"
    file.write_text("".join(cell.join(row) + "\n" for row in rows))
    advice = "try data.quoting: false"
    refuse(DataError, f"cannot be read as {extension}: ", advice, source=str(file), early=False)
    columns = {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    unquoted = DataRecipe(source=str(file), quoting=False, task="regression", columns=columns)
    assert len(load_data(unquoted, 0).train)
    file.write_text(file.read_text() + cell.join("abcdef") + "\n")
    with pytest.raises(DataError) as caught:
        load_data(DataRecipe(source=str(file)), seed=0)
    assert advice not in str(caught.value)
