"""From a request to the pieces of its answers: limits, room, and the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.serving.answers import Answer, Piece
from hunyuan_pretrain.serving.api_requests import MOST_CHOICES, ChatRequest, CompletionRequest, Request
from hunyuan_pretrain.serving.errors import EngineError, RequestError
from hunyuan_pretrain.serving.generation import Engine, Job
from hunyuan_pretrain.serving.vocabulary import Vocabulary

__all__ = ["Limits", "Prepared", "Service", "Usage"]

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's for /v1/completions. A chat may use what is left of the positions."""
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take."""

    positions: int
    """Of the model: prompt and answer."""
    new_tokens: int
    """Of one answer."""
    sequences: int = 128
    """Answers that are computed or wait, of all requests together."""
    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0
    """For a body to arrive."""
    send_seconds: float = 60.0
    """For a client to take the next piece of a stream."""


class Usage(NamedTuple):
    """Tokens of a request."""

    prompt: int
    new: int

    def as_json(self) -> dict[str, int]:
        """OpenAI's names."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
        }


class Prepared:
    """A request that has been checked: its jobs, in the order of its choices, and what they have given so far."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], jobs: list[Job], answers: list[Answer]
    ) -> None:
        self._engine, self._prompts, self._jobs, self._answers = engine, prompts, jobs, answers

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def usage(self) -> Usage:
        """So far. A prompt counts once, however many answers it gets."""
        return Usage(sum(map(len, self._prompts)), sum(answer.new_tokens for answer in self._answers))

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(choice, piece) as they come; the choices are computed together. Raises EngineError."""
        ready: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(self._continue(number, ready)) for number in range(len(self))]
        try:
            left = len(self)
            while left:
                item = await ready.get()
                if isinstance(item, Exception):
                    raise item
                left -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _continue(self, number: int, ready: asyncio.Queue[tuple[int, Piece] | Exception]) -> None:
        job, answer = self._jobs[number], self._answers[number]
        try:
            if answer.is_echoing and not job.scores_prompt:
                ready.put_nowait((number, answer.echo(job.prompt)))
            async with aclosing(self._engine.run(job)) as steps:
                async for scores in steps:
                    if answer.finish_reason is None and (piece := answer.add(scores)) != Piece():
                        ready.put_nowait((number, piece))
                    if answer.finish_reason is not None:
                        return
            if answer.finish_reason is None:
                raise EngineError("the engine ended before the answer did")
        except Exception as error:
            ready.put_nowait(error)


class Service:
    """One model, served."""

    def __init__(self, name: str, engine: Engine, vocabulary: Vocabulary, limits: Limits, system: str = "") -> None:
        """system: the system prompt of chats that have no system message, "" for none."""
        self.system = system
        self.name, self.engine, self.vocabulary, self.limits = name, engine, vocabulary, limits
        self.taken = 0
        """Answers that are computed or wait."""

    @contextlib.contextmanager
    def room(self, sequences: int) -> Iterator[None]:
        """Room for so many answers. Raises RequestError (429) if there is none now."""
        if self.taken + sequences > self.limits.sequences:
            raise RequestError(429, "too many requests wait; try again", code="queue_full", retry_after=RETRY_AFTER_S)
        self.taken += sequences
        try:
            yield
        finally:
            self.taken -= sequences

    def choices(self, request: Request) -> int:
        """How many answers a request wants. Raises RequestError: another model, too many."""
        if request.model != self.name:
            raise RequestError(
                404, f"the model here is {self.name!r}; see /v1/models", param="model", code="model_not_found"
            )
        count = request.n * (len(request.prompt) if isinstance(request, CompletionRequest) else 1)
        if count > MOST_CHOICES or count > self.limits.sequences:
            most = min(MOST_CHOICES, self.limits.sequences)
            raise RequestError(400, f"{count} answers, prompts times n; at most {most}", param="n")
        return count

    async def prepare(self, request: Request) -> Prepared:
        """Encode and check a request. Raises RequestError."""
        prompts = await asyncio.to_thread(self._encoded, request)
        is_completion = isinstance(request, CompletionRequest)
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        wanted = request.logprobs_wanted
        jobs, answers = [], []
        for number in range(len(prompts) * request.n):
            prompt = prompts[number // request.n]
            most = self._most_new_tokens(len(prompt), request, DEFAULT_COMPLETION_TOKENS if is_completion else None)
            scores_prompt = echo and wanted is not None
            jobs.append(Job(prompt, most, request.sampling(number % request.n), wanted, scores_prompt))
            answers.append(Answer(self.vocabulary, request.stop or (), most, prompt, echo))
        return Prepared(self.engine, prompts, jobs, answers)

    def _encoded(self, request: Request) -> list[list[int]]:
        """Ids of the prompts."""
        if isinstance(request, ChatRequest):
            messages = [each.model_dump() for each in request.messages]
            if self.system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system})
            self._refuse_long_text(sum(self.vocabulary.fewest_tokens(each["content"]) for each in messages))
            try:
                return [self.vocabulary.encode_chat(messages)]
            except DataFormatError as error:
                raise RequestError(400, str(error), param="messages") from None
        assert isinstance(request, CompletionRequest)
        found = []
        for prompt in request.prompt:
            if isinstance(prompt, str):
                self._refuse_long_text(self.vocabulary.fewest_tokens(prompt))
                try:
                    found.append(self.vocabulary.encode(prompt))
                except DataFormatError as error:
                    raise RequestError(400, str(error), param="prompt") from None
                continue
            if not prompt:
                raise RequestError(400, "a prompt without a token", param="prompt")
            wrong = next((token for token in prompt if not 0 <= token < self.vocabulary.size), None)
            if wrong is not None:
                raise RequestError(
                    400, f"a token id is outside the vocabulary, 0 to {self.vocabulary.size - 1}", param="prompt"
                )
            found.append(prompt)
        return found

    def _refuse_long_text(self, fewest_tokens: int) -> None:
        """Before a text that cannot fit is encoded."""
        if fewest_tokens > self.limits.positions:
            raise self._too_long(f"the text has more than {fewest_tokens} tokens")

    def _most_new_tokens(self, prompt_tokens: int, request: Request, default: int | None) -> int:
        left = self.limits.positions - prompt_tokens
        wanted = request.most_new_tokens
        if wanted is not None and wanted > self.limits.new_tokens:
            raise RequestError(
                400, f"max_tokens={wanted}: this server allows {self.limits.new_tokens}", param="max_tokens"
            )
        if left < (1 if wanted is None else wanted):
            more = "" if wanted is None else f" and max_tokens={wanted}"
            raise self._too_long(f"{prompt_tokens} tokens of prompt{more}")
        return min(left, self.limits.new_tokens, default or left) if wanted is None else wanted

    def _too_long(self, what: str) -> RequestError:
        text = f"{what}, but the model has {self.limits.positions} positions"
        return RequestError(400, text, code="context_length_exceeded")
