"""From tokens to text, finish reasons, counts and log-probabilities: one answer, as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hunyuan_pretrain.serving.generation import Scored
from hunyuan_pretrain.serving.vocabulary import StreamedText, Vocabulary

__all__ = ["Answer", "Entry", "Piece", "chat_logprobs", "completion_logprobs"]


class Entry(NamedTuple):
    """A token whose text is part of the answer."""

    scored: Scored
    offset: int
    """Characters of the text before it."""


@dataclass
class Piece:
    """What a step adds to an answer."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None
    """"stop" (the model ended, or a stop string was found) or "length" in the last piece."""


class Answer:
    """One sequence: takes tokens, gives pieces of text."""

    def __init__(
        self, vocabulary: Vocabulary, stop: Sequence[str], most_new_tokens: int, prompt: Sequence[int], echo: bool
    ) -> None:
        """echo: the text begins with the prompt's, and `add` gets the scores of its tokens first."""
        self._vocabulary, self._most = vocabulary, most_new_tokens
        self._prompt_left = len(prompt) if echo else 0
        self._prompt_text = StreamedText(vocabulary, ())
        self._text = StreamedText(vocabulary, stop)
        self._sent, self._before = 0, 0
        self._waiting: deque[Entry] = deque()
        self.new_tokens = 0
        self.finish_reason: str | None = None

    @property
    def is_echoing(self) -> bool:
        """Whether tokens of the prompt are expected next."""
        return self._prompt_left > 0

    def echo(self, prompt: Sequence[int]) -> Piece:
        """The text of the prompt, for an answer with `echo` whose engine does not score the prompt."""
        return self.add([Scored(token, None) for token in prompt])

    def add(self, scores: Sequence[Scored]) -> Piece:
        """What these tokens add. After a piece with a finish reason nothing may follow."""
        piece = Piece()
        for scored in scores:
            if self._prompt_left:
                self._waiting.append(Entry(scored, self._prompt_text.decoded))
                self._emit(piece, self._prompt_text.add(scored.token))
                self._prompt_left -= 1
                if not self._prompt_left:
                    self._emit(piece, self._prompt_text.finish())
                    self._before = self._sent
                    self._release(piece, self._sent + 1)  # all of the prompt
                continue
            self.new_tokens += 1
            self._waiting.append(Entry(scored, self._before + self._text.decoded))
            self._emit(piece, self._text.add(scored.token))
            if scored.token in self._vocabulary.stop_ids or self._text.is_stopped:
                piece.finish_reason = "stop"
            elif self.new_tokens == self._most:
                piece.finish_reason = "length"
            if piece.finish_reason:
                break
        if not self._most and not self._prompt_left:
            piece.finish_reason = "length"
        if piece.finish_reason:
            self._emit(piece, self._text.finish())
            # with a stop string, the tokens that begin after the cut are no part of the answer
            self._release(piece, self._sent if self._text.is_stopped else self._sent + 1)
            self.finish_reason = piece.finish_reason
        return piece

    def _emit(self, piece: Piece, text: str) -> None:
        piece.text += text
        self._sent += len(text)
        self._release(piece, self._sent)

    def _release(self, piece: Piece, end: int) -> None:
        """Add the tokens whose text begins before `end` to the piece."""
        while self._waiting and self._waiting[0].offset < end:
            piece.entries.append(self._waiting.popleft())


def completion_logprobs(vocabulary: Vocabulary, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of /v1/completions."""
    return {
        "tokens": [vocabulary.name_of(entry.scored.token) for entry in entries],
        "token_logprobs": [entry.scored.logprob for entry in entries],
        "top_logprobs": [_top_by_name(vocabulary, entry.scored) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top_by_name(vocabulary: Vocabulary, scored: Scored) -> dict[str, float] | None:
    """The likeliest tokens and the token itself."""
    if scored.logprob is None:
        return None
    found = {vocabulary.name_of(token): logprob for token, logprob in scored.top}
    return found | {vocabulary.name_of(scored.token): scored.logprob}


def chat_logprobs(vocabulary: Vocabulary, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": vocabulary.name_of(token),
            "logprob": logprob,
            "bytes": list(vocabulary.bytes_of(token)) or None,
        }

    return {
        "content": [
            one(entry.scored.token, entry.scored.logprob)
            | {"top_logprobs": [one(token, logprob) for token, logprob in entry.scored.top]}
            for entry in entries
        ],
        "refusal": None,
    }
