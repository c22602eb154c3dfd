"""The embedded data set: real, clean, always the same, and nothing of it in both splits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ranktune.errors import DataError, RecipeError
from ranktune.recipe import DataRecipe
from ranktune.tasks import check_source, docstrings, load_data
from ranktune.tasks.duplicates import distinct, similarity, words

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def examples() -> tuple[docstrings.Docstring, ...]:
    return docstrings.docstrings()


def test_every_chapter_has_enough_examples_to_be_learned(examples):
    counts = Counter(example.chapter for example in examples)
    assert len(counts) >= 18
    assert min(counts.values()) >= 50
    assert sum(counts.values()) > 4000
    assert max(counts.values()) < 0.15 * sum(counts.values())


def test_no_module_is_in_two_chapters():
    modules = [module for chapter in docstrings.CHAPTERS.values() for module in chapter.split()]
    assert len(modules) == len(set(modules))


def test_texts_are_clean(examples):
    for example in examples:
        assert docstrings.MIN_CHARACTERS <= len(example.text) <= docstrings.MAX_CHARACTERS
        assert example.text == " ".join(example.text.split())
        if example.module.isalpha():
            letters = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in example.text.lower())
            assert example.module.lower() not in letters.split() or example.module == "module"


def test_clean_drops_doctests_masks_the_module_and_cuts_between_words():
    text = docstrings.clean("Encode JSON.\n\n>>> import json\n>>> json.dumps(1)\n'1'\n\nSee json.load too.", "json")
    assert text == "Encode module. See module.load too."
    long = docstrings.clean("word " * 500, "json")
    assert len(long) <= docstrings.MAX_CHARACTERS
    assert long.endswith(" word")


def test_splits_share_no_text_and_no_near_duplicate():
    data = load_data(DataRecipe(evaluation_fraction=0.2), seed=0)
    train = {" ".join(words(text)) for text in data.train["text"]}
    evaluation = {" ".join(words(text)) for text in data.evaluation["text"]}
    assert not train & evaluation
    assert 0.15 < len(evaluation) / (len(train) + len(evaluation)) < 0.25
    # Brute force over a part of the pairs, independent of the index that removed the duplicates.
    for held_out in data.evaluation["text"][:15]:
        assert max(similarity(held_out, text) for text in data.train["text"]) < 0.5


def test_the_split_does_not_depend_on_the_seed_nor_on_the_process():
    here = load_data(DataRecipe(), seed=1).fingerprint
    code = (
        "from ranktune.recipe import DataRecipe; from ranktune.tasks import load_data; "
        "print(load_data(DataRecipe(), seed=2).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(PROJECT / "src")}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.strip() == here


def test_a_larger_evaluation_fraction_only_moves_texts_over():
    small = set(load_data(DataRecipe(evaluation_fraction=0.1), seed=0).evaluation["text"])
    large = set(load_data(DataRecipe(evaluation_fraction=0.3), seed=0).evaluation["text"])
    assert small < large


def test_labels_are_the_chapters_in_order():
    data = load_data(DataRecipe(), seed=0)
    assert data.task == "classification"
    # A Python that was built without Tk has no "graphical user interfaces".
    assert data.labels == sorted(set(docstrings.CHAPTERS) & set(data.labels or ()))
    assert len(data.labels) >= len(docstrings.CHAPTERS) - 1
    by_text = {example.text: example.chapter for example in docstrings.docstrings()}
    for row in data.evaluation.select(range(50)):
        assert data.labels[row["label"]] == by_text[row["text"]]


def test_building_takes_under_five_seconds():
    docstrings.docstrings.cache_clear()
    start = time.process_time()
    docstrings.docstrings()
    assert time.process_time() - start < 5


def test_a_planted_near_duplicate_goes_and_its_first_copy_stays():
    first = "Return a list of the words in the given string, using sep as the delimiter."
    second = "Open the file pointed to by the path, and return a file object for it."
    near = "Return a list of the words in the string, using sep as the delimiter string."
    assert distinct([first, second, near, first.upper()]) == [0, 1]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_distinct_agrees_with_comparing_every_pair(examples, threshold):
    texts = [example.text for example in examples[:150]]
    texts += [" ".join(text.split()[: 3 * len(text.split()) // 4]) for text in texts[::3]]
    expected: list[int] = []
    for position, text in enumerate(texts):
        if all(similarity(texts[earlier], text) < threshold for earlier in expected):
            expected.append(position)
    assert distinct(texts, threshold) == expected
    assert len(expected) < len(texts)


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    docstrings.docstrings.cache_clear()
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="needs the standard library's source files"):
        docstrings.docstrings()


@pytest.mark.parametrize(
    ("field", "value"), [("task", "regression"), ("columns", {"text": "a"}), ("labels", ["a"]), ("train", "x.csv")]
)
def test_settings_of_other_sources_are_refused(field, value):
    with pytest.raises(RecipeError, match=rf"data\.{field}"):
        check_source(DataRecipe(**{field: value}))
