"""An export in this process: transformers' model classes with their key/value cache, and a thread that computes.

Running jobs take turns, one token each, so a long answer does not hold up a short one. Each is computed alone: its
numbers do not depend on what else is running, and the same seed gives the same tokens.

V vocabulary size, S tokens of a chunk of the prompt.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Collection, Generator
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint.modeling_hunyuan import CACHE_NAME
from hunyuan_pretrain.serving.errors import EngineError
from hunyuan_pretrain.serving.generation import Job, Sampling, Scored, Steps

__all__ = ["LocalModel", "Worker"]

PREFILL_TOKENS = 2048
"""A longer prompt is read in chunks of so many tokens: others take their turn in between, and the logits of a chunk
are bounded."""
SCORED_ROWS = 256
"""Log-probabilities of a prompt are computed for so many positions at once."""

log = logging.getLogger("hunyuan_pretrain.serving")


class LocalModel:
    """A loaded model, as a function from a job to its tokens."""

    def __init__(self, model: Any, vocab_size: int, stop_ids: Collection[int]) -> None:
        """model: a transformers PreTrainedModel. vocab_size: ids of the tokenizer; the embedding may have more rows,
        which only pad it and are never returned. stop_ids: tokens that end a text."""
        self._model, self._vocab_size, self._stop_ids = model, vocab_size, frozenset(stop_ids)

    def steps(self, job: Job) -> Generator[list[Scored], None, None]:
        """As Engine.run. An empty list means only that something was computed. Raises EngineError."""
        prompt = torch.tensor([list(job.prompt)], device=self._model.device)
        length = prompt.shape[1]
        cache, last_V = None, None
        for begin in range(0, length, PREFILL_TOKENS):
            logits_SV, cache = self._forward(prompt[:, begin : begin + PREFILL_TOKENS], cache, job.scores_prompt)
            if job.scores_prompt:
                yield self._prompt_scores(job, begin, last_V, logits_SV)
            else:
                yield []
            last_V = logits_SV[-1]
        sampler = _Sampler(job.sampling, prompt, job.max_new_tokens)
        for number in range(job.max_new_tokens):
            assert last_V is not None
            token = sampler.choose(last_V)
            yield [self._scored(job, last_V, token)]
            if token in self._stop_ids or number + 1 == job.max_new_tokens:
                return
            logits_SV, cache = self._forward(torch.tensor([[token]], device=self._model.device), cache, False)
            last_V = logits_SV[-1]

    @torch.inference_mode()
    def _forward(self, tokens_1S: Tensor, cache: Any, wants_all: bool) -> tuple[Tensor, Any]:
        """fp32 logits (S or 1, V) of the tokenizer's ids, and the cache. Raises EngineError if they are not finite:
        sampling from them would be a fault of the device on a GPU."""
        output = self._model(tokens_1S, use_cache=True, logits_to_keep=0 if wants_all else 1, **{CACHE_NAME: cache})
        logits_SV = output.logits[0, :, : self._vocab_size].float()
        if not bool(logits_SV.isfinite().all()):
            raise EngineError("the model's logits are not finite; are its weights damaged?")
        return logits_SV, getattr(output, CACHE_NAME)

    @torch.inference_mode()
    def _prompt_scores(self, job: Job, begin: int, before_V: Tensor | None, logits_SV: Tensor) -> list[Scored]:
        """Scores of the tokens of a chunk. before_V: logits of the token before it, None for the first chunk."""
        tokens = job.prompt[begin : begin + len(logits_SV)]
        scores = [Scored(tokens[0], None)] if before_V is None else [self._scored(job, before_V, tokens[0])]
        for first in range(0, len(tokens) - 1, SCORED_ROWS):
            next_tokens = torch.tensor(tokens[first + 1 : first + 1 + SCORED_ROWS], device=logits_SV.device)
            logprobs_SV = logits_SV[first : first + len(next_tokens)].log_softmax(-1)
            own = logprobs_SV.gather(-1, next_tokens[:, None])[:, 0].tolist()
            tops = _top(logprobs_SV, job.top_logprobs or 0)
            scores += map(Scored, next_tokens.tolist(), own, tops)
        return scores

    @torch.inference_mode()
    def _scored(self, job: Job, logits_V: Tensor, token: int) -> Scored:
        if job.top_logprobs is None:
            return Scored(token, None)
        logprobs_V = logits_V.log_softmax(-1)
        return Scored(token, float(logprobs_V[token]), _top(logprobs_V[None], job.top_logprobs)[0])


def _top(logprobs_SV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    values, ids = logprobs_SV.topk(min(count, logprobs_SV.shape[-1]), dim=-1)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


class _Sampler:
    """Chooses the tokens of one job, with transformers' processors in the order in which its generate() applies
    them."""

    def __init__(self, sampling: Sampling, prompt: Tensor, max_new_tokens: int) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._sampling, self._filled, self._prompt_length = sampling, prompt.shape[1], prompt.shape[1]
        self._tokens = torch.cat((prompt, prompt.new_zeros(1, max_new_tokens)), dim=1)
        self._generator = torch.Generator(prompt.device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._processors: Any = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._warpers: Any = LogitsProcessorList()
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            self._warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
            self._warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else []

    @torch.inference_mode()
    def choose(self, logits_V: Tensor) -> int:
        """The next token."""
        so_far = self._tokens[:, : self._filled]
        scores_1V = self._processors(so_far, logits_V[None].clone())
        presence, frequency = self._sampling.presence_penalty, self._sampling.frequency_penalty
        if presence or frequency:
            counts_V = so_far[0, self._prompt_length :].bincount(minlength=scores_1V.shape[-1])
            scores_1V = scores_1V - frequency * counts_V - presence * (counts_V > 0)
        if self._sampling.temperature > 0:
            probabilities_1V = self._warpers(so_far, scores_1V).softmax(-1)
            token = int(torch.multinomial(probabilities_1V, 1, generator=self._generator))
        else:
            token = int(scores_1V.argmax())
        self._tokens[0, self._filled] = token
        self._filled += 1
        return token


class _Ticket:
    """A job in the worker, and where its tokens go."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.is_cancelled = False
        self.steps: Generator[list[Scored], None, None] | None = None
        self.results: asyncio.Queue[list[Scored] | Exception | None] = asyncio.Queue()
        """None: done."""
        self._loop = asyncio.get_running_loop()

    def put(self, item: list[Scored] | Exception | None) -> None:
        """Called in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self.results.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.is_cancelled = True


class Worker:
    """An Engine that computes in a thread of its own. `running` jobs take turns; the others wait in order."""

    def __init__(self, steps: Steps, running: int) -> None:
        self._steps, self._limit, self._is_broken = steps, running, False
        self._waiting: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread is alive, and the device can still compute."""
        return self._thread.is_alive() and not self._is_broken

    async def run(self, job: Job) -> AsyncGenerator[list[Scored], None]:
        """As Engine.run."""
        ticket = _Ticket(job)
        self._waiting.put(ticket)
        try:
            while (item := await ticket.results.get()) is not None:
                if isinstance(item, Exception):
                    raise EngineError(f"the model failed: {type(item).__name__}") from item
                yield item
        finally:
            ticket.is_cancelled = True

    async def close(self) -> None:
        """End the thread after the step that it computes."""
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        running: deque[_Ticket] = deque()
        while True:
            while len(running) < self._limit:
                try:
                    ticket = self._waiting.get(block=not running)
                except queue.Empty:
                    break
                if ticket is None:
                    return
                running.append(ticket)
            ticket = running.popleft()
            if not self._advance(ticket):
                running.append(ticket)

    def _advance(self, ticket: _Ticket) -> bool:
        """Compute one step of a job; whether it has ended. A job that fails ends alone."""
        has_ended = True
        try:
            if not ticket.is_cancelled:
                ticket.steps = ticket.steps or self._steps(ticket.job)
                step = next(ticket.steps, None)
                has_ended = step is None
                if step is None or step:
                    ticket.put(step)
        except Exception as error:
            log.exception("a request failed")
            self._is_broken |= isinstance(error, torch.AcceleratorError)  # the device refuses all that follows
            ticket.put(error)
        if has_ended:
            ticket.steps = None  # and with it the cache: the thread may hold the ticket until the next one comes
        return has_ended
