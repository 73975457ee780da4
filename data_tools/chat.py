"""Conversations as records: which of them are read, and what of them is trained on.

A record is {"messages": [{"role", "content"}, ...]}, as the Hunyuan-Large release reads it, or {"prompt",
"completion"}, two texts: one question and its answer. An answer is trained on with the <|eos|> that ends it; everything
else is only read. A pair is {"prompt", "chosen", "rejected"}: a conversation and two answers to it. The mask comes from
the structure of the conversation, never from token ids or a pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_tools.records import RecordForm, Reject, shown_value
from hunyuan_pretrain.data.arrays import PAIRS

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
"""Of the Hunyuan-Large release."""
MESSAGES, PROMPT, COMPLETION, CHOSEN, REJECTED = "messages", "prompt", "completion", "chosen", "rejected"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatForm(RecordForm):
    """How a record becomes a conversation. `text_of` returns its contents without the layout, which count as its bytes;
    `conversations_of` the messages."""

    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    """Of a conversation without a system message; "" for none."""
    train_end_of_user: bool = False
    """Also train on the <|extra_0|> before each answer, as the release does."""

    @cached_property
    def fields(self) -> list[str]:
        """Fields that --where reads; those of the conversation differ between records."""
        return list(self.where)

    @property
    def needs_whole_record(self) -> bool:
        """A conversation is encoded as a whole."""
        return True

    def as_json(self) -> dict[str, Any]:
        """The form as JSON for manifests."""
        return {**self.chat, "where": super().as_json()["where"]}

    @property
    def chat(self) -> dict[str, Any]:
        """What a run and an export need to know."""
        return {"system_prompt": self.system_prompt, "train_end_of_user": self.train_end_of_user}

    def text_of(self, where: str, record: Mapping[str, Any]) -> str | Reject | None:
        """The contents of a conversation, None if `self.where` leaves it out, or a Reject that says what is wrong."""
        for name in self.fields:
            if name not in record:
                return Reject(where, f"no field {name!r}, which --where asks for")
        if any(shown_value(record[name]) not in values for name, values in self.where.items()):
            return None
        problem = self.problem_of(record)
        if problem is not None:
            return Reject(where, problem)
        return "".join(message["content"] for chat in self.conversations_of(record) for message in chat)

    def problem_of(self, record: Mapping[str, Any]) -> str | None:
        """Why a record cannot be trained on; None if it can."""
        return _problem_of(record)

    def conversations_of(self, record: Mapping[str, Any]) -> list[Messages]:
        """The messages of a record that `text_of` accepts, a system message first, which may be empty."""
        if MESSAGES in record:
            given = [{"role": one["role"], "content": one["content"]} for one in record[MESSAGES]]
        else:
            given = [
                {"role": "user", "content": record[PROMPT]},
                {"role": "assistant", "content": record[COMPLETION]},
            ]
        return [self._with_system(given)]

    def _with_system(self, given: Messages) -> Messages:
        return given if given[0]["role"] == "system" else [{"role": "system", "content": self.system_prompt}, *given]


@dataclass(frozen=True)
class PairForm(ChatForm):
    """How a record becomes a pair: two conversations that differ in their last answer, the better one first."""

    @property
    def chat(self) -> dict[str, Any]:
        """What a run and an export need to know."""
        return {**super().chat, PAIRS: True}

    def problem_of(self, record: Mapping[str, Any]) -> str | None:
        """Why a record is no pair; None if it is one."""
        for name in (PROMPT, CHOSEN, REJECTED):
            if name not in record:
                fields = ", ".join(map(shown_value, list(record)[:8])) or "none"
                return f'no "{name}"; a pair has "prompt", "chosen" and "rejected" (fields: {fields})'
        for name in (CHOSEN, REJECTED):
            answer = _answer_of(record[name])
            if answer is None:
                return f'"{name}": expected text, or a list of one message of the assistant'
            prompt = record[PROMPT]
            given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if not isinstance(given, list):
                return f'"prompt" holds {type(given).__name__}, expected text or a list of {{"role", "content"}}'
            if not answer.strip():
                return f'"{name}" is empty'
            if problem := _problem_of({MESSAGES: [*given, {"role": "assistant", "content": answer}]}):
                return f'"prompt": {problem}'
        if _answer_of(record[CHOSEN]) == _answer_of(record[REJECTED]):
            return '"chosen" and "rejected" are the same answer'
        return None

    def conversations_of(self, record: Mapping[str, Any]) -> list[Messages]:
        """The conversations of a record that `text_of` accepts: with the chosen, and with the rejected answer."""
        prompt = record[PROMPT]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        given = self._with_system([{"role": one["role"], "content": one["content"]} for one in prompt])
        return [
            [*given, {"role": "assistant", "content": str(_answer_of(record[name]))}] for name in (CHOSEN, REJECTED)
        ]


def _answer_of(value: Any) -> str | None:
    """The text of an answer, which may be a list of one message; None if it is neither."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        message = value[0]
        value = message.get("content") if message.get("role") == "assistant" else None
    return value if isinstance(value, str) else None


def _problem_of(record: Mapping[str, Any]) -> str | None:
    """Why a record is not a conversation to train on; None if it is one."""
    if MESSAGES not in record:
        if PROMPT not in record or COMPLETION not in record:
            fields = ", ".join(map(shown_value, list(record)[:8])) or "none"
            return f'neither "messages" nor "prompt" and "completion" (fields: {fields})'
        for name in (PROMPT, COMPLETION):
            if not isinstance(record[name], str):
                return f'"{name}" holds {type(record[name]).__name__}, expected text; write turns as "messages"'
            if not record[name].strip():
                return f'"{name}" is empty'
        return None
    messages = record[MESSAGES]
    if not isinstance(messages, list):
        return f'"messages" holds {type(messages).__name__}, expected a list of {{"role", "content"}}'
    if not messages:
        return 'an empty conversation: "messages" has no message'
    return _problem_of_messages(messages)


def _problem_of_messages(messages: list[Any]) -> str | None:
    first = 0
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f'message {number}: expected {{"role", "content"}}, found {shown_value(message)[:80]}'
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            return f"message {number}: its content holds {type(content).__name__}, expected text"
        if number == 1 and role == "system":
            first = 1
            continue
        expected = ("user", "assistant")[(number - 1 - first) % 2]
        if role != expected:
            return (
                f"message {number}: role {shown_value(role)!r}, expected {expected!r}: an optional system message, "
                "then user and assistant in turn"
            )
        if not content.strip():
            return f"message {number}: the {role}'s message is empty"
    if len(messages) - first < 2:
        return "no assistant message: nothing in it would be trained on"
    if messages[-1]["role"] != "assistant":
        return f"message {len(messages)}: the last message is the user's; it has no answer to train on"
    return None
