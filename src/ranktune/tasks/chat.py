"""Conversations: lists of messages with a role and a content, turned into tokens by the tokenizer's chat template.

The template decides what stands around a message; here is only found out which tokens are the assistant's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from ranktune.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
ASSISTANT = "assistant"
_MARKS_ITSELF = re.compile(r"\{%-?\s*generation\b")  # templates that say which part of them the model writes


@dataclass(frozen=True)
class Conversation:
    """One conversation as the model sees it: token ids, whether each is to be learned, and the messages in it."""

    ids: list[int]
    learned: list[bool]
    messages: list[Message]


def without_gaps(messages: Sequence[Message]) -> list[Message]:
    """The messages without the fields that a table had to add because other messages have them."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def problem_with(messages: Any) -> str | None:
    """What keeps a cell from being a conversation to learn from, in words; None when it is one."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return f"holds a {type(messages).__name__}, not a list of messages"
    for number, message in enumerate(messages, start=1):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                return (
                    f"has no text in '{field}' of message {number}, which has the fields: "
                    f"{', '.join(without_gaps([message])[0])}. A message is {{'role': ..., 'content': ...}}"
                )
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        found = ", ".join(dict.fromkeys(message["role"] for message in messages))
        return f"has no answer to learn: no message of the role '{ASSISTANT}' with a content (roles: {found})"
    return None


def asked(messages: Sequence[Message]) -> str:
    """What the assistant answers in a conversation: everything that the others say."""
    return "\0".join(message["content"] for message in messages if message["role"] != ASSISTANT)


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise RecipeError(
            f"model: the tokenizer of '{tokenizer.name_or_path}' has no chat template, so it is not known how to put "
            "messages into one text. Take a model tuned for chat, save the template it should learn as "
            "chat_template.jinja in the model's folder, or give the data as prompt and completion columns."
        )
    if not tokenizer.is_fast:
        raise RecipeError(
            f"model: the tokenizer of '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) does not tell which "
            "characters a token stands for, which messages need. Give the data as prompt and completion columns."
        )


def fitted(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int, *, answers_only: bool
) -> Conversation:
    """The conversation in at most `max_length` tokens: while it is longer, it loses its oldest question and answer.

    What the system says stays. `answers_only`: see `tokenized`. Raises RecipeError when the last question with
    its answer is too long by itself, DataError when the template refuses the conversation.
    """
    kept = list(messages)
    while True:
        conversation = tokenized(kept, tokenizer, answers_only=answers_only)
        if len(conversation.ids) <= max_length:
            return conversation
        shorter = _without_oldest(kept)
        if shorter is None:
            raise RecipeError(
                f"data.max_length: the conversation '{asked(kept)[:40]}...' takes {len(conversation.ids)} tokens with "
                f"its last question and answer alone, more than {max_length}. Set {len(conversation.ids)} or more, or "
                "shorten it."
            )
        kept = shorter


def tokenized(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, answers_only: bool) -> Conversation:
    """The conversation as ids, and which of them are to be learned.

    With `answers_only` what the assistant says, with what the template puts behind its turns; else everything.
    """
    encoded: Any
    if not answers_only:
        encoded = _templated(messages, tokenizer, return_dict=True)
        learned = [True] * len(encoded["input_ids"])
    elif _MARKS_ITSELF.search(tokenizer.get_chat_template()):
        encoded = _templated(messages, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        learned = [bool(flag) for flag in encoded["assistant_masks"]]
    else:
        text, turns = answers_in_text(messages, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learned = [any(begin <= first < end for begin, end in turns) for first, _ in encoded["offset_mapping"]]
    return Conversation(list(encoded["input_ids"]), learned, list(messages))


def answers_in_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one text, and where in it the assistant's turns begin and end.

    A turn begins where the model would be asked to write it (the template's generation prompt), and ends where the
    conversation up to it ends. Raises DataError when the template writes a beginning otherwise than the whole.
    """
    text = _templated(messages, tokenizer, tokenize=False)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        # Templates cannot write a conversation of no message; an assistant that begins is learned from the start.
        before = _templated(messages[:number], tokenizer, tokenize=False, add_generation_prompt=True) if number else ""
        through = _templated(messages[: number + 1], tokenizer, tokenize=False)
        if not through.startswith(before) or not text.startswith(through):
            raise DataError(
                f"data: the chat template of '{tokenizer.name_or_path}' rewrites what was said before message "
                f"{number + 1} of the conversation '{asked(messages)[:40]}...', so it cannot be seen which part is the "
                "answer. Mark it in the template with {% generation %}, or set data.loss_on: everything."
            )
        turns.append((len(before), len(through)))
    return text, turns


def _templated(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except jinja2.TemplateError as error:
        raise DataError(
            f"data: the chat template of '{tokenizer.name_or_path}' refuses the conversation "
            f"'{asked(messages)[:40]}...': {error}"
        ) from error


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The conversation without its first question and what follows up to the next one; None when it is the last."""
    questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2 or not any(message["role"] == ASSISTANT for message in messages[questions[1] :]):
        return None
    return messages[: questions[0]] + messages[questions[1] :]
