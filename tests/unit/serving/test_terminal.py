"""The chat in the terminal: what it remembers, how it is stopped, and what it shows."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.generation import Job, Sampling, Scored
from hunyuan_pretrain.serving.local_engine import LocalModel
from hunyuan_pretrain.serving.terminal import Conversation, talk
from hunyuan_pretrain.serving.vocabulary import Vocabulary

ROOT = Path(__file__).parents[3]
GREEDY = Sampling(temperature=0, repetition_penalty=1.0)


class Recorder:
    """Steps that answer with a fixed text and keep the prompts."""

    def __init__(self, text: str = "Yes.", interrupt_after: int | None = None) -> None:
        self.tokens, self.interrupt_after = list(text.encode()), interrupt_after
        self.prompts: list[list[int]] = []

    def steps(self, job: Job) -> Generator[list[Scored], None, None]:
        self.prompts.append(list(job.prompt))
        for number, token in enumerate(self.tokens[: job.max_new_tokens]):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield [Scored(token, -1.0)]
        if len(self.tokens) < job.max_new_tokens:
            yield [Scored(257, -1.0)]  # <|endoftext|>


def said(conversation: Conversation, text: str) -> str:
    out = io.StringIO()
    talk(conversation, io.StringIO(text), out)
    return out.getvalue()


def conversation(recorder: Recorder, vocabulary: Vocabulary, **changes: object) -> Conversation:
    options = {"positions": 100, "system": "", "sampling": GREEDY} | changes
    return Conversation(recorder.steps, vocabulary, **options)


def test_a_conversation_is_remembered_until_reset(vocabulary: Vocabulary) -> None:
    recorder = Recorder()
    text = said(conversation(recorder, vocabulary), "One?\n\nTwo?\n/reset\n/system Be brief.\nThree?\n")
    assert text == "Yes.\nYes.\nYes.\n"
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."}]
    expected = [turns[:1], [*turns, {"role": "user", "content": "Two?"}]]
    expected.append([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Three?"}])
    assert recorder.prompts == [vocabulary.encode_chat(each) for each in expected]


def test_an_interrupt_stops_the_answer_only(vocabulary: Vocabulary) -> None:
    recorder = Recorder("A long answer", interrupt_after=6)
    talked = conversation(recorder, vocabulary)
    assert said(talked, "One?\n") == "A long [stopped]\n"
    assert talked.turns[-1] == {"role": "assistant", "content": "A long"}
    recorder.interrupt_after = None
    assert said(talked, "Two?\n") == "A long answer\n"


def test_control_characters_of_a_model_do_not_reach_the_terminal(vocabulary: Vocabulary) -> None:
    assert said(conversation(Recorder("a\x1b[2J\x9b1mé\tb\n"), vocabulary), "?\n") == "a�[2J�1mé\tb\n\n"


def test_what_cannot_be_answered_says_why(vocabulary: Vocabulary) -> None:
    for text, message in (
        ("/rest\n", "/rest: no such command; /reset forgets"),
        ("x" * 99 + "\n", "the conversation has 101 tokens, the model 100 positions"),
    ):
        with pytest.raises(ServingError, match=message):
            said(conversation(Recorder(), vocabulary), text)


def test_the_model_answers_as_the_server_does(local: LocalModel, vocabulary: Vocabulary) -> None:
    talked = Conversation(local.steps, vocabulary, 4096, "", GREEDY, max_new_tokens=8)
    first, second = ("".join(talked.answer("Hi")) for _ in range(2))
    assert [turn["role"] for turn in talked.turns] == ["user", "assistant"] * 2
    assert talked.turns[1]["content"] == first
    assert talked.turns[3]["content"] == second


def test_the_command_in_a_terminal(export: Path) -> None:
    """Ctrl-C in an answer, then a command, then Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hunyuan_pretrain", "chat", str(export), "--seed", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True
    )
    os.close(theirs)
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 65536)

    try:
        read_until(b"> ")
        shown = b""
        os.write(ours, b"Hi\n")
        read_until(b"Hi\r\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        read_until(b"\r\n> ")  # stopped, or the model ended by itself
        shown = b""
        os.write(ours, b"/reset\n")
        read_until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0, process.stderr
    finally:
        process.kill()
        os.close(ours)
