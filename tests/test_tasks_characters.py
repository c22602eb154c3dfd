"""Characters: unknown ones never match, replaced ones do, and models with two tables of them need no tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BartConfig, EvalPrediction, PreTrainedTokenizerFast

from ranktune.errors import DataError, RecipeError
from ranktune.recipe import DataRecipe
from ranktune.tasks import Data, build_task, check_source, load_data
from ranktune.tasks.character_tokenizer import CharacterTokenizer, character_tokenizer
from ranktune.tasks.replacement import replacer
from ranktune.tasks.unknown import UnknownTokens, unknown_id


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def two_tables(**changes) -> BartConfig:
    """As the grapheme-to-phoneme models have them: `a` is 4 when read, 6 when written."""
    fields = {"grapheme_chars": "____abc", "phoneme_chars": "____æba", "vocab_size": 9}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return BartConfig(**{**fields, **special, **changes})


def letters() -> PreTrainedTokenizerFast:
    """One token for each of a to d; everything else is unknown."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcd "]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def seq2seq(targets: list[str], **settings):
    split = datasets.Dataset.from_dict({"source_text": ["a"] * len(targets), "target": targets})
    return build_task(DataRecipe(**settings), Data(split, split, "seq2seq", None, "", "")), split


def score(generated: list[list[int]], targets: list[str], tokenizer) -> dict[str, float]:
    task, split = seq2seq(targets)
    rows = task.tokenize(split, tokenizer)

    def padded(ids: list[list[int]]) -> np.ndarray:
        return np.array([row + [-100] * (9 - len(row)) for row in ids])

    return task.compute_metrics(EvalPrediction(padded(generated), padded(rows["labels"][:])), rows)


def test_two_unknown_characters_are_not_taken_for_equal():
    tokenizer = letters()
    same, unknown, trailing = ([4, 5, 6], [4, 3, 6], [4, 5, 6, 3])
    assert score([same, same], ["abc", "abc"], tokenizer)["exact_match"] == 1
    # What the model wrote holds an unknown token; so does the target: they may be different characters.
    assert score([unknown, same], ["aXc", "abc"], tokenizer)["exact_match"] == 0.5
    # An unknown token that was written is an edit, and so is one of the target that was not.
    assert score([trailing], ["abc"], tokenizer) == {"exact_match": 0, "character_error_rate": pytest.approx(1 / 3)}
    assert score([same], ["abcX"], tokenizer) == {"exact_match": 0, "character_error_rate": pytest.approx(1 / 4)}
    assert score([unknown], ["aXc"], tokenizer) == {"exact_match": 0, "character_error_rate": pytest.approx(1 / 3)}
    assert score([[4, 4, 4]], ["XaX"], tokenizer)["character_error_rate"] == pytest.approx(2 / 3)


def test_a_tokenizer_that_knows_everything_is_scored_as_ever():
    """GPT-2 and its kin give their end of text as the unknown token too: it must not be one here."""
    tokenizer = letters()
    tokenizer.unk_token = "</s>"
    assert unknown_id(tokenizer) is None
    task, split = seq2seq(["abc"])
    labels = np.array([[4, 5, 6, 2]])
    rows = task.tokenize(split, tokenizer)
    assert task.compute_metrics(EvalPrediction(labels, labels), rows)["exact_match"] == 1


def test_unknown_characters_are_told_once_with_their_number(caplog):
    task, split = seq2seq(["aXc", "bcd", "YXc", "dZd"])
    task.tokenize(split, letters())
    (record,) = caplog.records
    message = record.getMessage()
    assert "4 of 12 tokens in the targets (33.3 %)" in message
    assert "'X', 'Y', 'Z';" in message
    assert "always count as missed" in message
    assert "data.replace" in message


def test_many_unknown_characters_are_abridged(caplog):
    unknown = UnknownTokens(letters())
    text = "".join(chr(number) for number in range(0x100, 0x140))
    unknown.count(text, letters()(text)["input_ids"])
    unknown.warn("text", "so")
    message = caplog.records[0].getMessage()
    assert "64 of 64" in message
    assert message.count("'") == 2 * 8 + 1  # eight characters, and "the model's"
    assert ", ...; so" in message


@pytest.mark.parametrize(
    ("rows", "layout"),
    [({"text": ["abXd", "", "a"]}, "text"), ({"prompt": ["X"] * 2, "completion": ["abXd", "a"]}, "completions")],
)
def test_causal_scores_that_unknown_characters_flatter(rows, layout, caplog):
    split = datasets.Dataset.from_dict(rows)
    task = build_task(DataRecipe(max_length=16), Data(split, split, "causal-lm", None, "", ""))
    task.tokenize(split, letters())
    (record,) = caplog.records
    assert f"1 of 5 tokens in the {layout} (20.0 %)" in record.getMessage()
    assert "flatters" in record.getMessage()


def test_nothing_is_said_where_everything_is_known(caplog):
    task, split = seq2seq(["abc"])
    with caplog.at_level(logging.INFO, "ranktune"):
        task.tokenize(split, letters())
    assert not caplog.records


def test_characters_change_places_and_the_longest_goes_first():
    assert replacer({"a": "b", "b": "a", "ab": "!", "\n": " ", ".": ""})("a.b\nab") == "ba !"


def test_texts_are_replaced_before_they_are_split_and_scored(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"source_text": f"a{row}", "target": "ab"} for row in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = load_data(DataRecipe(source=str(file)), seed=0)
    data = load_data(DataRecipe(source=str(file), replace={"target": {"a": "æ"}}), seed=0)
    assert {*data.train["target"], *data.evaluation["target"]} == {"æb"}
    assert data.train["source_text"][:] == plain.train["source_text"][:]
    assert data.train.column_names == plain.train.column_names
    assert data.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("settings", "parts", "early"),
    [
        ({"replace": {"targt": {"a": "b"}}}, ["data.replace", "'targt'", "Did you mean 'target'?"], True),
        ({"replace": {"label": {"a": "b"}}}, ["data.replace", "holds no text"], True),
        ({"replace": {"text": {"a": "b"}}, "task": "seq2seq"}, ["data.replace", "'text'", "'seq2seq'"], True),
        ({"replace": {"prompt": {"a": "b"}}}, ["data.replace", "'prompt'", "the roles here: text"], False),
    ],
)
def test_replacement_where_there_is_nothing_to_replace(settings, parts, early, tmp_path):
    (tmp_path / "rows.txt").write_text("one\n\ntwo\n\nthree\n")
    recipe = DataRecipe(source=str(tmp_path / "rows.txt"), **settings)
    with pytest.raises(RecipeError) as caught:
        check_source(recipe) if early else load_data(recipe, seed=0)
    for part in parts:
        assert part in str(caught.value)


WORDS = {"cat": "kat", "dog": "dog", "read": {"DEFAULT": "rid", "PAST": "red"}, "no": None, "hen": "hen"}


def dictionary(folder: Path, **settings) -> DataRecipe:
    file = folder / "words.json"
    file.write_text(json.dumps(WORDS, ensure_ascii=False), encoding="utf-8")
    columns = {"source_text": "key", "target": "value"}
    return DataRecipe(source=str(file), task="seq2seq", columns=columns, evaluation_fraction=0.3, **settings)


def test_a_dictionary_is_a_list_of_its_entries(tmp_path):
    with pytest.raises(DataError, match="row 3 of the train split has nothing in the column 'value'"):
        load_data(dictionary(tmp_path), seed=0)
    data = load_data(dictionary(tmp_path, skip_incomplete=True), seed=0)
    pairs = [tuple(row.values()) for split in (data.train, data.evaluation) for row in split]
    assert sorted(pairs) == [("cat", "kat"), ("dog", "dog"), ("hen", "hen")]
    assert data.description.endswith("2 to train, 1 to evaluate (2 incomplete left out)")


def test_lists_and_lines_of_rows_are_no_dictionaries(tmp_path):
    rows = [{"text": f"text {row}", "label": "ab"[row % 2]} for row in range(8)]
    found = []
    for content in (json.dumps(rows), "".join(json.dumps(row) + "\n" for row in rows)):
        (tmp_path / "some.json").write_text(content)
        data = load_data(DataRecipe(source=str(tmp_path / "some.json")), seed=0)
        found.append(data.fingerprint)
    assert found[0] == found[1]


def test_incomplete_rows_are_left_out_only_on_request(tmp_path):
    rows = ["text,label", "one,x", ",y", "two,y", "three,", "four,x", "five,y"]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    settings = {"source": str(tmp_path / "rows.csv"), "task": "classification", "evaluation_fraction": 0.2}
    with pytest.raises(DataError, match="row 2 of the train split"):
        load_data(DataRecipe(**settings), seed=0)
    data = load_data(DataRecipe(**settings, skip_incomplete=True, labels=["x", "y"]), seed=0)
    assert sorted([*data.train["text"], *data.evaluation["text"]]) == ["five", "four", "one", "two"]
    assert "2 incomplete" in data.description
    (tmp_path / "rows.csv").write_text("text,label\n,x\n,y\n")
    with pytest.raises(DataError, match=r"data\.skip_incomplete: every example of the train split"):
        load_data(DataRecipe(**settings, skip_incomplete=True), seed=0)


def test_blank_lines_of_a_corpus_are_complete(tmp_path):
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "", "two", ""]))
    data = load_data(DataRecipe(source=str(tmp_path / "wiki.jsonl"), skip_incomplete=True), seed=0)
    assert len(data.train) + len(data.evaluation) == 4
    assert "incomplete" not in data.description


def test_one_table_to_read_and_one_to_write(tmp_path):
    tokenizer = character_tokenizer(two_tables())
    assert tokenizer(["abc", "caX"])["input_ids"] == [[1, 4, 5, 6, 2], [1, 6, 4, 3, 2]]
    assert tokenizer(text_target=["æab", "c"])["input_ids"] == [[1, 4, 6, 5, 2], [1, 3, 2]]
    assert tokenizer("a")["input_ids"] == [1, 4, 2]  # back to reading
    assert tokenizer("abc", truncation=True, max_length=4)["input_ids"] == [1, 4, 5, 2]
    assert tokenizer.batch_decode([[1, 4, 6, 5, 2, 0, 0]], skip_special_tokens=True) == ["æab"]
    assert tokenizer.decode([4, 3, 8]) == "æ<unk><unk>"  # 8 is a number that neither table has
    tokenizer.save_pretrained(tmp_path)
    again = CharacterTokenizer.from_pretrained(tmp_path)
    assert again(text_target="æab")["input_ids"] == [1, 4, 6, 5, 2]
    assert again("abc")["input_ids"] == [1, 4, 5, 6, 2]


def test_other_models_have_a_tokenizer_of_their_own():
    assert character_tokenizer(BartConfig()) is None
    assert character_tokenizer(two_tables(phoneme_chars=None)) is None


@pytest.mark.parametrize("changes", [{"vocab_size": 6}, {"pad_token_id": 7}, {"bos_token_id": None}])
def test_tables_that_do_not_fit_are_refused(changes):
    with pytest.raises(RecipeError, match=r"config\.json lists 7 characters to read and 7 to write"):
        character_tokenizer(two_tables(**changes))


def test_unknown_characters_of_a_table_are_told(caplog):
    task, split = seq2seq(["æX", "Xa"])
    task.tokenize(split, character_tokenizer(two_tables()))
    assert "2 of 8 tokens in the targets (25.0 %) are unknown to the model's vocabulary: 'X';" in caplog.text
