"""Each task inside a real `Trainer`, with models made on the spot: batches, padding, masks and scores."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    EvalPrediction,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from ranktune.errors import DataError, RecipeError
from ranktune.recipe import DataRecipe
from ranktune.tasks import Data, Task, build_task, load_data

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz .,"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_tokenizer(folder: Path, characters: list[str], template: str | None = None, **special: str) -> None:
    """One token per character; `template`: the special tokens around a text, like "<s> $A </s>"."""
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if template:
        around = [(token, characters.index(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    write_tokenizer(folder, VOCABULARY, pad_token="<pad>", model_max_length=40)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=48, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    """A GPT-2 as it comes: no padding token in the tokenizer, none in the configuration."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(folder, VOCABULARY, eos_token="</s>")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bart")
    write_tokenizer(folder, VOCABULARY, "$A </s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    sizes = {f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=40, **tokens, forced_eos_token_id=2, **sizes))
    model.generation_config = GenerationConfig(
        **tokens, forced_eos_token_id=2, do_sample=True, temperature=5.0, min_length=9, max_length=9
    )
    model.save_pretrained(folder)
    return str(folder)


def make(task: str, rows: dict[str, list], labels: list[str] | None = None, **settings: Any) -> tuple[Task, Data]:
    split = datasets.Dataset.from_dict(rows)
    data = Data(split, split, task, labels, "", "")
    return build_task(DataRecipe(**settings), data), data


def evaluate(task: Task, data: Data, path: str, output: Path, batch_size: int = 4) -> dict[str, float]:
    torch.manual_seed(0)  # a new head is random
    model, tokenizer = task.load_model(path, dtype=torch.float32), task.load_tokenizer(path)
    arguments = task.arguments_class(
        output_dir=str(output),
        per_device_eval_batch_size=batch_size,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **task.training_arguments,
    )
    examples = task.tokenize(data.evaluation, tokenizer)
    trainer = task.trainer_class(
        model,
        arguments,
        data_collator=task.collator(tokenizer, model),
        compute_metrics=partial(task.compute_metrics, examples=examples),
        preprocess_logits_for_metrics=task.preprocess_logits,
    )
    return trainer.evaluate(examples)


TEXTS = ["a", "the cat sat.", "b c", "one two three four five", "no", "yes, yes", "zzz", "dog."]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_classification_scores_each_text_as_if_it_were_alone(kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    rows = {"text": TEXTS, "label": [0, 1, 2, 0, 1, 2, 0, 1]}
    task, data = make("classification", rows, ["x", "y", "z"], max_length=16)
    torch.manual_seed(0)
    model, tokenizer = task.load_model(path).eval(), task.load_tokenizer(path)
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    with torch.no_grad():
        alone = [
            int(model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:16]])).logits.argmax()) for text in TEXTS
        ]
    expected = np.mean([chosen == label for chosen, label in zip(alone, rows["label"], strict=True)])
    assert len(set(alone)) > 1
    for batch_size in (1, 3, 8):
        scores = evaluate(task, data, path, tmp_path, batch_size)
        assert scores["eval_accuracy"] == pytest.approx(expected)


def test_pairs_go_in_as_pairs(encoder):
    task, data = make("classification", {"text": ["ab"], "text_pair": ["c"], "label": [1]}, ["x", "y"], max_length=16)
    tokenizer = task.load_tokenizer(encoder)
    row = task.tokenize(data.train, tokenizer)[0]
    assert row["input_ids"] == tokenizer("ab", "c")["input_ids"] != tokenizer("ab")["input_ids"]
    assert row["labels"] == 1


def test_regression_has_one_number_per_text(encoder, tmp_path):
    rows = {"text": TEXTS, "label": [0.5 * number for number in range(8)]}
    task, data = make("regression", rows, max_length=16)
    torch.manual_seed(0)
    model, tokenizer = task.load_model(encoder).eval(), task.load_tokenizer(encoder)
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:16]])).logits) for text in TEXTS]
    scores = evaluate(task, data, encoder, tmp_path, batch_size=3)
    assert scores["eval_mse"] == pytest.approx(np.mean((np.array(alone) - rows["label"]) ** 2), rel=1e-4)
    assert scores["eval_pearson"] == pytest.approx(np.corrcoef(alone, rows["label"])[0, 1], rel=1e-4)
    assert scores["eval_loss"] > 0


CORPUS = ["the cat sat on the mat.", "", "a dog.", "one two three four five six seven eight nine ten."]


def test_a_running_text_loses_no_token_and_predicts_each_once(decoder):
    task, data = make("causal-lm", {"text": CORPUS}, max_length=10)
    tokenizer = task.load_tokenizer(decoder)
    end = tokenizer.eos_token_id
    stream = [end]  # GPT-2 has no token of its own to start with
    for text in filter(None, CORPUS):
        stream += [*tokenizer(text)["input_ids"], end]
    blocks = task.tokenize(data.train, tokenizer)
    assert [token for block in blocks for token in block["labels"][1:]] == stream[1:]
    assert all(block["input_ids"] == block["labels"] for block in blocks)
    assert max(len(block["input_ids"]) for block in blocks) == 10
    assert all(
        block["input_ids"][0] == before["input_ids"][-1] for before, block in zip(blocks, blocks.skip(1), strict=False)
    )


@pytest.mark.parametrize("length", range(2, 14))
def test_every_character_is_counted_in_the_block_where_its_text_ends(decoder, length):
    task, data = make("causal-lm", {"text": CORPUS}, max_length=length)
    tokenizer = task.load_tokenizer(decoder)
    blocks = task.tokenize(data.train, tokenizer)
    ends = np.cumsum([len(tokenizer(text)["input_ids"]) + 1 for text in CORPUS if text])  # places in the stream
    expected = [0] * len(blocks)
    for text, end in zip(filter(None, CORPUS), ends, strict=True):
        expected[(end - 1) // (length - 1)] += len(text)  # a block predicts one token less than it holds
    assert blocks["characters"][:] == expected
    assert sum(expected) == sum(map(len, CORPUS))


def test_language_model_scores_do_not_depend_on_the_batches(decoder, tmp_path):
    task, data = make("causal-lm", {"text": CORPUS}, max_length=10)
    model, tokenizer = task.load_model(decoder).eval(), task.load_tokenizer(decoder)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for block in task.tokenize(data.train, tokenizer):
            ids = torch.tensor([block["input_ids"]])
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    for batch_size in (1, 3, 16):
        scores = evaluate(task, data, decoder, tmp_path, batch_size)
        assert scores["eval_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
        assert scores["eval_nats_per_character"] == pytest.approx(nats / sum(map(len, CORPUS)), rel=1e-5)
    again = evaluate(task, data, decoder, tmp_path, 3)
    assert again["eval_nats_per_token"] == evaluate(task, data, decoder, tmp_path, 3)["eval_nats_per_token"]


def test_only_completions_are_learned_and_prompts_are_cut_from_the_left(decoder, tmp_path):
    rows = {"prompt": ["ab", "abcdefghijklmnop"], "completion": ["xyz", "uvw"]}
    task, data = make("causal-lm", rows, max_length=10)
    tokenizer = task.load_tokenizer(decoder)
    short, long = task.tokenize(data.train, tokenizer)
    ids = {letter: number for number, letter in enumerate(VOCABULARY)}
    assert short["input_ids"] == [2, ids["a"], ids["b"], ids["x"], ids["y"], ids["z"], 2]
    assert short["labels"] == [-100, -100, -100, ids["x"], ids["y"], ids["z"], 2]
    assert long["input_ids"] == [2, *(ids[letter] for letter in "lmnopuvw"), 2]
    assert long["labels"][:6] == [-100] * 6
    batch = task.collator(tokenizer, task.load_model(decoder))([dict(short), dict(long)])
    assert batch["labels"].tolist()[0][7:] == [-100] * 3
    assert batch["attention_mask"].tolist()[0] == [1] * 7 + [0] * 3
    scores = evaluate(task, data, decoder, tmp_path)
    assert scores["eval_nats_per_character"] == pytest.approx(scores["eval_nats_per_token"] * 8 / 6)


def test_answers_are_never_cut(decoder, encoder_decoder):
    task, data = make("causal-lm", {"prompt": ["a"], "completion": ["b" * 20]}, max_length=10)
    with pytest.raises(RecipeError, match=r"data\.max_length: the completion 'bbb.*takes 22 tokens"):
        task.tokenize(data.train, task.load_tokenizer(decoder))
    task, data = make("seq2seq", {"source_text": ["a"], "target": ["b" * 20]}, max_length=10, max_target_length=9)
    with pytest.raises(RecipeError, match=r"data\.max_target_length: the target 'bbb.*takes 21 tokens"):
        task.tokenize(data.train, task.load_tokenizer(encoder_decoder))


def test_a_corpus_of_blank_lines_is_refused(decoder):
    task, data = make("causal-lm", {"text": ["", ""]})
    task.max_length = 10
    with pytest.raises(DataError, match="only empty rows"):
        task.tokenize(data.train, task.load_tokenizer(decoder))


@pytest.mark.parametrize("name", ["classification", "causal-lm", "seq2seq"])
def test_more_tokens_than_positions_are_refused(name, request):
    path, rows, field = {
        "classification": ("encoder", {"text": ["a"], "label": [0]}, "max_length"),
        "causal-lm": ("decoder", {"text": ["a"]}, "max_length"),
        "seq2seq": ("encoder_decoder", {"source_text": ["a"], "target": ["b"]}, "max_target_length"),
    }[name]
    path = request.getfixturevalue(path)
    task, data = make(name, rows, ["x", "y"], **{"max_length": 10, field: 100})
    with pytest.raises(RecipeError, match=rf"data\.{field}: 100 tokens, but the model takes \d\d"):
        task.load_model(path)
    if name == "classification":
        with pytest.raises(RecipeError, match="but the tokenizer takes 40"):
            task.tokenize(data.train, task.load_tokenizer(path))


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    tokenizer = Tokenizer(WordLevel({"a": 0}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    task, _ = make("classification", {"text": ["a"], "label": [0]}, ["x", "y"])
    with pytest.raises(RecipeError, match="cannot be padded"):
        task.load_tokenizer(str(tmp_path))


def test_generation_is_greedy_whatever_the_model_brings(encoder_decoder, tmp_path):
    sources, length = ["ab", "abc", "b"], 6
    task, data = make("seq2seq", {"source_text": sources, "target": ["z"] * 3}, max_target_length=length, max_length=10)
    model, tokenizer = task.load_model(encoder_decoder).eval(), task.load_tokenizer(encoder_decoder)
    generated = []
    for text in sources:
        ids, produced = torch.tensor([tokenizer(text)["input_ids"]]), [1]
        while len(produced) < length and produced[-1] != 2:
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([produced])).logits
            produced.append(int(logits[0, -1].argmax()))
        generated.append(tokenizer.decode(produced, skip_special_tokens=True).strip())
    assert all(generated)
    for targets, exact in ((generated, 1), ([generated[0], "z", "z"], 1 / 3)):
        rows = {"source_text": sources, "target": targets}
        task, data = make("seq2seq", rows, max_target_length=length, max_length=10)
        for batch_size in (1, 3):
            assert evaluate(task, data, encoder_decoder, tmp_path, batch_size)["eval_exact_match"] == exact


def test_scores_of_generated_text_by_hand(encoder_decoder):
    rows = {"source_text": ["a"], "target": ["b"]}
    task, data = make("seq2seq", rows, max_length=10, max_target_length=6)
    tokenizer = task.load_tokenizer(encoder_decoder)
    task.tokenize(data.train, tokenizer)

    def padded(texts: list[str]) -> np.ndarray:
        rows = [tokenizer(text)["input_ids"] for text in texts]
        return np.array([row + [-100] * (8 - len(row)) for row in rows])

    generated, targets = ["cat", "dg", "bird"], ["cat", "dog", "bard"]
    scores = task.compute_metrics(EvalPrediction(padded(generated), padded(targets)), data.train)
    assert scores == {"exact_match": pytest.approx(1 / 3), "character_error_rate": pytest.approx(2 / 10)}


def test_babyllama_knows_no_shakespeare_yet(real_data, tmp_path):
    text = (real_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").replace("\n", " ")
    task, data = make("causal-lm", {"text": [text[:3000], text[500_000:503_000]]}, max_length=256)
    scores = evaluate(task, data, str(real_data / "models" / "babyllama105"), tmp_path, batch_size=8)
    assert 2.4 < scores["eval_nats_per_character"] < 3.4
    # One token per character, and for each text a space put before it and the end.
    assert scores["eval_nats_per_token"] == pytest.approx(scores["eval_nats_per_character"], rel=2e-3)


@pytest.mark.parametrize(("accent", "exact"), [("us", 0.654), ("gb", 0.688)])
def test_g2p_bart_spells_two_thirds_of_the_words_right(accent, exact, real_data, tmp_path):
    """The models bring no tokenizer but two tables of characters, and their dictionaries are one object each."""
    recipe = DataRecipe(
        source=str(real_data / "g2p" / f"{accent}_gold.json"),
        task="seq2seq",
        columns={"source_text": "key", "target": "value"},
        skip_incomplete=True,
        max_eval_examples=600,
        max_length=60,
        max_target_length=60,
    )
    data = load_data(recipe, seed=0)
    path = str(real_data / "models" / f"g2p-bart-{accent}")
    scores = evaluate(build_task(recipe, data), data, path, tmp_path, batch_size=64)
    assert scores["eval_exact_match"] == pytest.approx(exact, abs=0.05)  # of all words; two standard errors are 0.04
    assert scores["eval_character_error_rate"] < 0.12
