"""Conversations: which tokens of a chat template's text are learned, what is cut, and every refusal."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ranktune.errors import DataError, RecipeError
from ranktune.recipe import DataRecipe, load_recipe
from ranktune.run.display import SilentDisplay
from ranktune.tasks import build_task, check_source, load_data
from ranktune.tasks.chat import without_gaps
from ranktune.training import train
from tests.tiny import write_recipe

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "<|", "|>", *"abcdefghijklmnopqrstuvwxyz .,:\n"]
# One turn is "<|" role "|>" content "</s>" newline; the generation prompt opens the assistant's.
TURNS = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'moderator' %}{{ raise_exception('no moderators here') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The same, but the template says itself what the assistant writes: without the newline behind its turns.
MARKED = (
    "{{ '<s>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Leaves out the answers before the last one, as templates of reasoning models do with their thoughts.
FORGETFUL = (
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}"
    "{{ message['role'] + ':' + message['content'] }}{% endif %}{% endfor %}"
)
SYSTEM, HELLO, HI, MORE, YES = (
    {"role": role, "content": content}
    for role, content in [
        ("system", "be kind."),
        ("user", "hello"),
        ("assistant", "hi you"),
        ("user", "more, please"),
        ("assistant", "yes."),
    ]
)
CHAT = [SYSTEM, HELLO, HI, MORE, YES]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_chat_model(folder: Path, template: str | None = TURNS) -> str:
    """A one-layer GPT-2 with a token per character, and a chat template."""
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(["<|", "|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=40, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


def load(folder: Path, chats: list[Any], **settings: Any):
    """The task and data of chats in a file of JSON lines, as `ranktune train` makes them."""
    for name in ("chats.jsonl", "again.jsonl"):
        (folder / name).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    settings = {"evaluation": "again.jsonl", "max_length": 100, **settings}
    recipe = DataRecipe(source=str(folder / "chats.jsonl"), **settings)
    check_source(recipe)
    data = load_data(recipe, seed=0)
    return build_task(recipe, data), data


def learned_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    """The parts of a tokenised conversation that are learned, a bar between them."""
    return "".join(tokenizer.convert_ids_to_tokens(label) if label != -100 else "_" for label in row["labels"]).strip(
        "_"
    )


def tokenize(folder: Path, model: str, chats: list[Any], **settings: Any):
    task, data = load(folder, chats, **settings)
    tokenizer = task.load_tokenizer(model)
    return task.tokenize(data.train, tokenizer), tokenizer


def test_only_what_the_assistant_says_is_learned(model, tmp_path):
    rows, tokenizer = tokenize(tmp_path, model, [CHAT])
    whole = "<s>" + "".join(f"<|{turn['role']}|>{turn['content']}</s>\n" for turn in CHAT)
    assert tokenizer.decode(rows[0]["input_ids"]) == whole
    between = "_" * len(["<|", *"user", "|>", *MORE["content"], "</s>", "\n", "<|", *"assistant", "|>"])
    assert learned_text(rows[0], tokenizer) == f"hi you</s>\n{between}yes.</s>\n"
    assert rows[0]["characters"] == len("hi you") + len("yes.")
    assert all(label in (-100, token) for label, token in zip(rows[0]["labels"], rows[0]["input_ids"], strict=True))


def test_what_is_learned_begins_where_the_model_will_be_asked(model, tmp_path):
    """The prompt of the template's own `add_generation_prompt` and the learned part are the conversation together."""
    rows, tokenizer = tokenize(tmp_path, model, [[HELLO, HI]])
    prompt = tokenizer.apply_chat_template([HELLO], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rows[0]["input_ids"][: len(prompt)] == prompt
    assert rows[0]["labels"] == [-100] * len(prompt) + rows[0]["input_ids"][len(prompt) :]


def test_a_template_that_marks_answers_is_believed(tmp_path):
    rows, tokenizer = tokenize(tmp_path, write_chat_model(tmp_path / "model", MARKED), [CHAT])
    assert learned_text(rows[0], tokenizer).replace("_", "") == "hi you</s>yes.</s>"


def test_everything_can_be_learned(model, tmp_path):
    rows, _ = tokenize(tmp_path, model, [CHAT], loss_on="everything")
    assert rows[0]["labels"] == rows[0]["input_ids"]
    assert rows[0]["characters"] == sum(len(turn["content"]) for turn in CHAT)


def test_prompts_can_be_learned_too(model, tmp_path):
    split = datasets.Dataset.from_dict({"prompt": ["abc", "x" * 20], "completion": ["de", "yz"]})
    for loss_on, characters in (("completion", [2, 2]), ("everything", [5, 8])):
        task, _ = load(tmp_path, [[HELLO, HI]] * 2 + [CHAT], loss_on=loss_on)
        task._encode = task._pairs
        task.max_length = 10
        rows = task.tokenize(split, task.load_tokenizer(model))
        assert rows["characters"][:] == characters  # six of the twenty fit, beside start, completion and end
        assert [row["labels"] == row["input_ids"] for row in rows] == [loss_on == "everything"] * 2


def test_long_conversations_lose_their_oldest_questions_never_the_system(model, tmp_path):
    late = [SYSTEM, MORE, YES]
    rows, tokenizer = tokenize(tmp_path, model, [CHAT, late, [SYSTEM, HELLO, HI, HELLO, HI, MORE, YES]], max_length=64)
    assert len(rows[1]["input_ids"]) <= 64 < len(tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"])
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["characters"] == len("yes.")
    with pytest.raises(RecipeError, match=r"data\.max_length: the conversation 'be kind.*takes (\d+) tokens.*Set \1"):
        tokenize(tmp_path, model, [CHAT], max_length=40)
    # A last question nobody answers must not push the answers out.
    with pytest.raises(RecipeError, match="last question and answer alone"):
        tokenize(tmp_path, model, [[HELLO, HI, MORE]], max_length=40)


def test_scores_count_answers_alone(model, tmp_path):
    """Nats per token and per character by hand, from one conversation at a time; padding and batches do not matter."""
    chats = [CHAT, [HELLO, HI], [MORE, YES, HELLO, HI]]
    task, data = load(tmp_path, chats)
    network, tokenizer = task.load_model(model).eval(), task.load_tokenizer(model)
    rows = task.tokenize(data.evaluation, tokenizer)
    nats, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            scores = network(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for place, label in enumerate(row["labels"]):
            if label != -100:
                nats += float(scores[place - 1].exp().sum().log() - scores[place - 1, label])
                tokens += 1
    assert tokens == len("hi you") * 3 + len("yes.") * 2 + 2 * 5  # the end and the newline of five answers
    arguments = task.arguments_class(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = task.trainer_class(
        network,
        arguments,
        data_collator=task.collator(tokenizer, network),
        compute_metrics=partial(task.compute_metrics, examples=rows),
        preprocess_logits_for_metrics=task.preprocess_logits,
    )
    found = trainer.evaluate(rows)
    assert found["eval_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["eval_nats_per_character"] == pytest.approx(nats / (3 * 6 + 2 * 4), rel=1e-5)


def test_a_recipe_trains_on_conversations(model, tmp_path):
    chats = [[{"role": "user", "content": f"{word} hello"}, HI] for word in ("one", "two", "three", "four", "five")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    recipe = write_recipe(
        tmp_path,
        model=model,
        data={"source": str(tmp_path / "chats.jsonl"), "max_length": 64, "evaluation_fraction": 0.2},
        train={"epochs": 20, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 0.05, "eval_every": "never"},
    )
    metrics = train(load_recipe(recipe), recipe, SilentDisplay())
    assert metrics["task"] == "causal-lm"
    # The frozen, nearly empty network can hardly tell two characters apart, whatever its adapter does.
    assert metrics["after"] < 0.95 * metrics["before"]


def test_equal_questions_stay_in_one_split(tmp_path):
    chats = [
        [{"role": "user", "content": f"q{row % 5}"}, {"role": "assistant", "content": f"a{row}"}] for row in range(40)
    ]
    _, data = load(tmp_path, chats, evaluation=None, evaluation_fraction=0.3)
    asked = [{chat[0]["content"] for chat in split["messages"]} for split in (data.train, data.evaluation)]
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 5
    assert len(data.train) + len(data.evaluation) == 40


def test_fields_that_only_some_messages_have_do_not_reach_the_others(tmp_path):
    """A table has every field in every row: `name` of one message must not become None in the rest."""
    template = TURNS.replace("message['role'] + '|>'", "message['role'] + '|>' + message.get('name', 'nobody')")
    folder = write_chat_model(tmp_path / "model", template)
    chats = [[{**HELLO, "name": "ann"}, HI], [MORE, YES]]
    datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_parquet(tmp_path / "chats.parquet")
    data = load_data(DataRecipe(source=str(tmp_path / "chats.parquet"), evaluation_fraction=0.4), seed=0)
    tables = [*data.train["messages"], *data.evaluation["messages"]]
    assert sum(message["name"] is None for chat in tables for message in chat) == 3
    task = build_task(DataRecipe(), data)
    tokenizer = task.load_tokenizer(folder)
    rows = [row for split in (data.train, data.evaluation) for row in task.tokenize(split, tokenizer)]
    texts = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    assert "annhello" in texts
    assert texts.count("nobody") == 3
    # transformers 5.23 drops them too; not every version that we work with does.
    assert without_gaps(tables[0]) == [{k: v for k, v in turn.items() if v is not None} for turn in tables[0]]


@pytest.mark.parametrize(
    ("chat", "parts"),
    [
        ([], ["row 2", "no answer to learn", "'messages'"]),
        ([HELLO], ["row 2", "no message of the role 'assistant'", "roles: user"]),
        ([HELLO, {"role": "assistant", "content": " "}], ["no answer to learn"]),
        ([HELLO, {"role": "assistant", "content": None}], ["no text in 'content' of message 2"]),
        ([{"from": "human", "value": "hello"}], ["no text in 'role' of message 1", "from, value"]),
    ],
)
def test_conversations_that_cannot_be_learned_from_are_named(chat, parts, tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, [[HELLO, HI], chat, [MORE, YES]])
    for part in parts:
        assert part in str(caught.value)


def test_a_column_of_texts_is_no_column_of_messages(tmp_path):
    with pytest.raises(DataError, match="row 1 of the train split holds a str, not a list of messages"):
        load(tmp_path, ["hello", "you"])


def test_a_tokenizer_without_a_template_is_refused_with_the_fix(tmp_path):
    with pytest.raises(RecipeError, match=r"no chat template.*chat_template\.jinja.*prompt and completion"):
        tokenize(tmp_path, write_chat_model(tmp_path / "model", None), [CHAT])


def test_a_template_that_rewrites_the_past(tmp_path):
    folder = write_chat_model(tmp_path / "model", FORGETFUL)
    with pytest.raises(DataError, match=r"rewrites what was said before message 3 .*data\.loss_on: everything"):
        tokenize(tmp_path, folder, [CHAT])
    rows, _ = tokenize(tmp_path, folder, [CHAT], loss_on="everything")
    assert rows[0]["labels"] == rows[0]["input_ids"]


def test_a_conversation_that_the_template_refuses(model, tmp_path):
    chat = [{"role": "moderator", "content": "hush"}, HELLO, HI]
    with pytest.raises(DataError, match=r"refuses the conversation 'hush.*no moderators here"):
        tokenize(tmp_path, model, [chat])


def test_an_assistant_that_begins(model, tmp_path):
    rows, tokenizer = tokenize(tmp_path, model, [[HI, MORE, YES]])
    assert learned_text(rows[0], tokenizer).startswith("<s><|assistant|>hi you</s>\n_")


def test_replacement_reaches_messages(tmp_path):
    _, data = load(tmp_path, [CHAT, [HELLO, HI]], replace={"messages": {"hi": "good day"}})
    said = [turn["content"] for chat in data.train["messages"] for turn in chat]
    assert said == ["be kind.", "hello", "good day you", "more, please", "yes.", "hello", "good day you"]


def test_unknown_characters_in_answers_are_told(model, tmp_path, caplog):
    tokenize(tmp_path, model, [[{"role": "user", "content": "9"}, {"role": "assistant", "content": "42 and 4"}]])
    (record,) = caplog.records
    assert "3 of 10 tokens in the messages (30.0 %)" in record.getMessage()
    assert "'4', '2';" in record.getMessage()


def test_only_causal_lm_can_choose_what_is_learned(tmp_path):
    (tmp_path / "some.csv").write_text("text,label\n" + "a,x\nb,y\n" * 3)
    settings = {"source": str(tmp_path / "some.csv"), "loss_on": "everything", "labels": ["x", "y"]}
    refusal = r"data\.loss_on.*causal-lm.*'classification'"
    with pytest.raises(RecipeError, match=refusal):
        check_source(DataRecipe(**settings, task="classification"))
    with pytest.raises(RecipeError, match=refusal):
        load_data(DataRecipe(**settings), seed=0)
