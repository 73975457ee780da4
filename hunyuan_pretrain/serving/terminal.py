"""A chat in the terminal, without a server."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TextIO

from hunyuan_pretrain.serving.answers import Answer
from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.exports import load_local, read_positions, refuse_folder, system_prompt_of
from hunyuan_pretrain.serving.generation import Job, Sampling, Steps
from hunyuan_pretrain.serving.vocabulary import Vocabulary

__all__ = ["Conversation", "run", "talk"]

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt, Ctrl-C stops an answer, Ctrl-D ends"
SHOWN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters, with which a model's text could steer the terminal, and what is shown in their place."""


class Conversation:
    """Turns so far, and their continuation."""

    def __init__(
        self,
        steps: Steps,
        vocabulary: Vocabulary,
        positions: int,
        system: str,
        sampling: Sampling,
        max_new_tokens: int | None = None,
    ) -> None:
        """steps: as LocalModel.steps. max_new_tokens: None for what is left of the positions."""
        self._steps, self._vocabulary, self._positions = steps, vocabulary, positions
        self._sampling, self._most = sampling, max_new_tokens
        self.system = system
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, as it comes. One that is interrupted stays in the conversation as far as it got.
        Raises ServingError, and changes nothing, if there is no room for an answer; DataFormatError likewise for text
        that cannot be encoded."""
        turns = [*self.turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self._vocabulary.encode_chat([*system, *turns])
        left = self._positions - len(prompt)
        if left < 1:
            raise ServingError(
                f"the conversation has {len(prompt)} tokens, the model {self._positions} positions; /reset, or "
                "write less"
            )
        most = left if self._most is None else min(left, self._most)
        return self._continue(turns, prompt, most)

    def _continue(self, turns: list[dict[str, str]], prompt: list[int], most: int) -> Generator[str, None, None]:
        answer = Answer(self._vocabulary, (), most, prompt, echo=False)
        said = ""
        try:
            with closing(self._steps(Job(prompt, most, self._sampling))) as steps:
                for scores in steps:
                    piece = answer.add(scores)
                    said += piece.text
                    yield piece.text
                    if piece.finish_reason:
                        break
        finally:
            self.turns = [*turns, {"role": "assistant", "content": said}]


def run(
    export: Path, lora: Path | None, device: str, system: str | None, max_new_tokens: int | None, sampling: Sampling
) -> None:
    """Load an export and talk on standard input and output. system: None for that with which the model was fine-tuned.
    Raises ServingError, CheckpointError, DataFormatError."""
    refuse_folder(export)
    vocabulary = Vocabulary(export)
    system = system_prompt_of(system, vocabulary, lora)
    model = load_local(export, lora, device, vocabulary)
    positions = read_positions(export)
    talk(
        Conversation(model.steps, vocabulary, positions, system, sampling, max_new_tokens),
        sys.stdin,
        sys.stdout,
    )


def talk(conversation: Conversation, source: TextIO, out: TextIO) -> None:
    """Answer each line of the source until it ends. Raises ServingError, DataFormatError if the source is no terminal:
    there, the message is printed instead."""
    is_terminal = source.isatty()
    if is_terminal:
        print(COMMANDS, file=out)
    for line in _lines(source, out, is_terminal):
        try:
            _obey(conversation, line, out)
        except ValueError as error:  # both kinds
            if not is_terminal:
                raise
            print(error, file=out)


def _lines(source: TextIO, out: TextIO, is_terminal: bool) -> Iterator[str]:
    """Lines that are not blank."""
    if is_terminal:
        import readline  # noqa: F401, gives input() editing and a history

    while True:
        try:
            line = input("> ") if is_terminal else source.readline()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(file=out)
            continue
        except UnicodeDecodeError:
            raise ServingError("the input is not UTF-8") from None
        if not is_terminal and not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _obey(conversation: Conversation, line: str, out: TextIO) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest.strip()
    elif command.startswith("/"):
        raise ServingError(f"{command}: no such command; {COMMANDS}")
    else:
        with closing(conversation.answer(line)) as pieces:
            try:
                for text in pieces:
                    out.write(text.translate(SHOWN))
                    out.flush()
            except KeyboardInterrupt:
                out.write(" [stopped]")
        print(file=out, flush=True)
