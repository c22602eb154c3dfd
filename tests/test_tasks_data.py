"""Files of every format, columns and tasks that are guessed, and splits that are the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from ranktune.recipe import DataRecipe
from ranktune.tasks import check_source, load_data

ROWS = [{"text": f"text number {row}", "label": "good" if row % 3 else "bad"} for row in range(30)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(file: Path, rows: list[dict]) -> Path:
    """Write the rows in the format of the file's extension."""
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix in (".jsonl", ".ndjson"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(str(cell) for cell in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def load(source: Path, seed: int = 0, **settings):
    recipe = DataRecipe(source=str(source), **settings)
    check_source(recipe)
    return load_data(recipe, seed)


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "ndjson", "json", "parquet"])
def test_every_format_gives_the_same_examples(extension, tmp_path):
    data = load(write(tmp_path / f"reviews.{extension}", ROWS))
    assert data.task == "classification"
    assert data.labels == ["bad", "good"]
    assert data.train.column_names == data.evaluation.column_names == ["text", "label"]
    found = [(row["text"], data.labels[row["label"]]) for split in (data.train, data.evaluation) for row in split]
    assert sorted(found) == sorted((row["text"], row["label"]) for row in ROWS)
    assert data.fingerprint == load(write(tmp_path / "same.jsonl", ROWS)).fingerprint


def test_nothing_is_written_beside_the_data(tmp_path):
    load(write(tmp_path / "reviews.csv", ROWS))
    assert [file.name for file in tmp_path.rglob("*")] == ["reviews.csv"]


def test_progress_bars_stay_as_the_user_set_them(tmp_path, capfd):
    datasets.enable_progress_bars()
    load(write(tmp_path / "reviews.csv", ROWS))
    assert not datasets.utils.are_progress_bars_disabled()
    assert "%|" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["validation", "dev", "test", "eval"])
def test_a_folder_with_split_files(name, tmp_path):
    write(tmp_path / "train.csv", ROWS[:20])
    write(tmp_path / f"{name}.csv", ROWS[20:])
    data = load(tmp_path)
    assert data.train["text"][:] == [row["text"] for row in ROWS[:20]]
    assert data.evaluation["text"][:] == [row["text"] for row in ROWS[20:]]


def test_validation_comes_before_test_and_settings_before_both(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:10])
    write(tmp_path / "validation.jsonl", ROWS[10:20])
    write(tmp_path / "test.jsonl", ROWS[20:])
    assert load(tmp_path).evaluation["text"][0] == "text number 10"
    assert load(tmp_path, evaluation="test").evaluation["text"][0] == "text number 20"
    assert load(tmp_path, train="test.jsonl", evaluation="train").train["text"][0] == "text number 20"


def test_shards_as_the_hub_writes_them(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[10:20])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:10])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[20:])
    data = load(tmp_path)
    assert data.train["text"][:] == [row["text"] for row in ROWS[:20]]
    assert len(data.evaluation) == 10


def test_a_file_with_another_file_for_evaluation(tmp_path):
    write(tmp_path / "held_out.tsv", ROWS[20:])
    data = load(write(tmp_path / "mine.csv", ROWS[:20]), evaluation="held_out.tsv")
    assert (len(data.train), len(data.evaluation)) == (20, 10)
    assert data.evaluation["text"][0] == "text number 20"


def test_without_a_header_columns_have_numbers(tmp_path):
    file = tmp_path / "raw.tsv"
    file.write_text("".join(f"{row % 2}\t*\tsentence {row}\n" for row in range(10)))
    data = load(file, header=False, columns={"text": "column_2", "label": "column_0"})
    assert len(data.train) + len(data.evaluation) == 10
    assert data.labels == ["0", "1"]


def test_quotes_can_be_plain_characters(tmp_path):
    file = tmp_path / "raw.tsv"
    file.write_text("text\tlabel\n" + '" unclosed quote\tyes\nplain "quoted" words\tno\n' * 4)
    data = load(file, quoting=False, evaluation_fraction=0.01, labels=["no", "yes"])
    assert set(data.train["text"]) | set(data.evaluation["text"]) == {'" unclosed quote', 'plain "quoted" words'}


def test_quotes_delimiters_and_line_breaks_inside_a_cell(tmp_path):
    file = tmp_path / "semi.csv"
    file.write_text("text;label\n" + '"one; ""two""\nthree";a\nfour;b\n' * 3)
    data = load(file, delimiter=";", evaluation_fraction=0.01, labels=["a", "b"])
    assert set(data.train["text"]) | set(data.evaluation["text"]) == {'one; "two"\nthree', "four"}


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    file = write(tmp_path / "reviews.csv", ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(file).labels == ["bad", "good"]


def test_words_that_other_readers_take_for_missing_stay_words(tmp_path):
    rows = [{"text": text, "label": label} for text in ("NA", "None", "nan", "x") for label in ("null", "n/a")]
    data = load(write(tmp_path / "words.csv", rows), evaluation_fraction=0.2)
    assert data.labels == ["n/a", "null"]
    assert set(data.train["text"]) | set(data.evaluation["text"]) == {"NA", "None", "nan", "x"}


def test_a_text_file_is_a_corpus_of_paragraphs(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("First paragraph,\ntwo lines.\n\nSecond one.\n\nThird.\n")
    data = load(file, evaluation_fraction=0.3)
    assert data.task == "causal-lm"
    texts = [text.strip() for split in (data.train, data.evaluation) for text in split["text"]]
    assert sorted(texts) == ["First paragraph,\ntwo lines.", "Second one.", "Third."]


@pytest.mark.parametrize(
    ("row", "task", "roles"),
    [
        ({"sentence": "s", "label": 1}, "classification", {"text": "s"}),
        ({"review": "s", "sentiment": "pos"}, "classification", {"text": "s"}),
        ({"Text": "s", "Label": True}, "classification", {"text": "s"}),
        ({"idx": 4, "premise": "p", "hypothesis": "h", "label": 0}, "classification", {"text": "p", "text_pair": "h"}),
        ({"question": "q", "sentence": "s", "label": "yes"}, "classification", {"text": "q", "text_pair": "s"}),
        ({"sentence1": "a", "sentence2": "b", "score": 2.5}, "regression", {"text": "a", "text_pair": "b"}),
        ({"text": "t"}, "causal-lm", {"text": "t"}),
        ({"story": "t"}, "causal-lm", {"text": "t"}),
        ({"prompt": "p", "completion": "c"}, "causal-lm", {"prompt": "p", "completion": "c"}),
        ({"id": "7", "document": "d", "summary": "s"}, "seq2seq", {"source_text": "d", "target": "s"}),
        ({"source_text": "d", "target": "s"}, "seq2seq", {"source_text": "d", "target": "s"}),
    ],
)
def test_roles_and_task_are_guessed_when_obvious(row, task, roles, tmp_path):
    # Each row differs in its text; labels alternate between the given one and another of its kind.
    def variant(number: int, name: str, value):
        if isinstance(value, str) and roles.keys() - {"label"} and name.lower() not in ("label", "sentiment"):
            return f"{value} {number}"
        return value if number % 2 else {bool: False, int: 5, float: 0.5, str: "neg"}[type(value)]

    rows = [{name: variant(number, name, value) for name, value in row.items()} for number in range(12)]
    data = load(write(tmp_path / "some.jsonl", rows))
    assert data.task == task
    first = data.train[0]
    assert {role: first[role].rsplit(" ", 1)[0] for role in roles} == roles
    assert set(first) - set(roles) == ({"label"} if "label" in data.train.column_names else set())


def test_columns_settle_what_is_not_obvious(tmp_path):
    rows = [{"mr": f"name[{row}]", "ref": f"The {row}."} for row in range(8)]
    file = write(tmp_path / "e2e.csv", rows)
    data = load(file, columns={"source_text": "mr", "target": "ref"})
    assert data.task == "seq2seq"
    assert sorted([*data.train["target"], *data.evaluation["target"]]) == sorted(row["ref"] for row in rows)
    assert load(file, task="causal-lm", columns={"text": "ref"}).train.column_names == ["text"]


def test_a_text_chosen_by_hand_gets_no_guessed_partner(tmp_path):
    rows = [{"sentence1": f"a {row}", "sentence2": f"b {row}", "label": row % 2} for row in range(8)]
    data = load(write(tmp_path / "pairs.jsonl", rows), columns={"text": "sentence2"})
    assert data.train.column_names == ["text", "label"]
    assert data.train["text"][0].startswith("b ")


def test_whole_numbers_sort_as_numbers_and_the_recipe_can_set_the_order(tmp_path):
    rows = [{"text": f"t {row}", "label": [10, 9, 2][row % 3]} for row in range(12)]
    for file in (write(tmp_path / "n.csv", rows), write(tmp_path / "n.parquet", rows)):
        assert load(file).labels == ["2", "9", "10"]
        data = load(file, labels=["10", "9", "2", "1"])
        assert data.labels == ["10", "9", "2", "1"]
        assert {data.labels[row["label"]] for row in data.train} == {"10", "9", "2"}


def test_class_names_of_the_hub_keep_their_order(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["unrelated", "equal"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]}, features=features)
    rows.to_parquet(str(tmp_path / "hub.parquet"))
    data = load(tmp_path / "hub.parquet", evaluation_fraction=0.25)
    assert data.labels == ["unrelated", "equal"]
    assert {row["text"]: row["label"] for split in (data.train, data.evaluation) for row in split} == {
        "a": 1,
        "b": 0,
        "c": 1,
        "d": 0,
    }


def test_regression_labels_are_numbers(tmp_path):
    rows = [{"text": f"t {row}", "score": row / 4} for row in range(12)]
    data = load(write(tmp_path / "scores.csv", rows))
    assert data.task == "regression"
    assert data.labels is None
    assert sorted([*data.train["label"], *data.evaluation["label"]]) == [row / 4 for row in range(12)]


def test_the_split_off_evaluation_has_the_asked_size_and_no_text_of_training(tmp_path):
    rows = [{"text": f"text {row % 50}", "label": "a" if row % 2 else "b"} for row in range(200)]
    data = load(write(tmp_path / "repeats.jsonl", rows), evaluation_fraction=0.2)
    assert not set(data.train["text"]) & set(data.evaluation["text"])
    assert len(data.train) + len(data.evaluation) == 200
    assert 40 <= len(data.evaluation) < 44  # groups of four stay together
    again = load(write(tmp_path / "repeats.jsonl", rows), seed=5, evaluation_fraction=0.2)
    assert again.fingerprint == data.fingerprint


def test_samples_follow_the_seed_in_training_only(tmp_path):
    file = write(tmp_path / "many.jsonl", ROWS)
    limits = {"max_train_examples": 8, "max_eval_examples": 3, "evaluation_fraction": 0.4}
    first, same, other = (load(file, seed=seed, **limits) for seed in (0, 0, 1))
    assert (len(first.train), len(first.evaluation)) == (8, 3)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.evaluation["text"][:] == other.evaluation["text"][:]
    assert first.train["text"][:] != other.train["text"][:]
    order = [row["text"] for row in ROWS]
    assert sorted(first.train["text"], key=order.index) == first.train["text"][:]


def test_the_fingerprint_sees_every_cell(tmp_path):
    changed = [*ROWS[:-1], {**ROWS[-1], "label": "bad" if ROWS[-1]["label"] == "good" else "good"}]
    before = load(write(tmp_path / "before.csv", ROWS)).fingerprint
    assert load(write(tmp_path / "after.csv", changed)).fingerprint != before


def test_blank_lines_of_a_corpus_are_allowed(tmp_path):
    rows = [{"text": ""}, {"text": "one"}, {"text": "two"}, {"text": " "}, {"text": "three"}]
    data = load(write(tmp_path / "wiki.jsonl", rows), evaluation_fraction=0.2)
    assert len(data.train) + len(data.evaluation) == 5


GLUE = {
    "CoLA": ({"header": False, "columns": {"text": "column_3", "label": "column_1"}}, 8551, 1043, "classification"),
    "MRPC": (
        {"columns": {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}, "task": "classification"},
        3668,
        408,
        "classification",
    ),
    "RTE": ({}, 2490, 277, "classification"),
    "SST-2": ({"max_eval_examples": 1000}, 67349, 872, "classification"),
    "STS-B": ({}, 5749, 1500, "regression"),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_with_its_official_splits(name, real_data):
    settings, train, evaluation, task = GLUE[name]
    data = load(real_data / "glue" / name, quoting=False, **settings)
    assert (data.task, len(data.train), len(data.evaluation)) == (task, train, evaluation)
    with (real_data / "glue" / name / "dev.tsv").open(encoding="utf-8-sig") as file:
        last = file.read().rstrip("\n").split("\n")[-1].split("\t")
    assert data.evaluation["text"][-1] in last
    if data.labels:
        assert data.labels == (["entailment", "not_entailment"] if name == "RTE" else ["0", "1"])


def test_e2e_csv_with_quotes(real_data):
    columns = {"source_text": "mr", "target": "ref"}
    data = load(
        real_data / "e2e", train="trainset.csv", evaluation="devset.csv", columns=columns, max_train_examples=10
    )
    assert (data.task, len(data.train), len(data.evaluation)) == ("seq2seq", 10, 4672)
    assert data.evaluation["source_text"][0].startswith("name[")
