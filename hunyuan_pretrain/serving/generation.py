"""What an engine is asked to compute and what it returns: token ids only, no text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["Engine", "Job", "Sampling", "Scored", "Steps"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are those of Tencent's serving scripts."""

    temperature: float = 0.7
    """0: always the likeliest token."""
    top_p: float = 0.6
    top_k: int = 20
    """0: no limit."""
    repetition_penalty: float = 1.05
    """Of every token that the prompt or the answer contains; 1: none."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Of tokens of the answer: subtracted from the logit once, and once for each occurrence."""
    seed: int | None = None
    """None: another answer each time."""


@dataclass(frozen=True)
class Job:
    """One sequence to continue."""

    prompt: Sequence[int]
    max_new_tokens: int
    """0: only score the prompt."""
    sampling: Sampling
    top_logprobs: int | None = None
    """How many of the likeliest tokens are returned beside each scored token; None: no log-probabilities either."""
    scores_prompt: bool = False
    """Also return the log-probability of each token of the prompt."""


class Scored(NamedTuple):
    """A token and its log-probability by the model alone: before temperature and penalties, over the ids that the
    tokenizer has."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, and if none is wanted."""
    top: Sequence[tuple[int, float]] = ()
    """The likeliest tokens, best first."""


Steps = Callable[[Job], Generator[list[Scored], None, None]]
"""Computes a job in the caller's thread; yields what Engine.run does."""


class Engine(Protocol):
    """Computes jobs. Closing the generator of `run` cancels its job."""

    def run(self, job: Job) -> AsyncGenerator[list[Scored], None]:
        """Yields the scores of the prompt in one or more lists, if the job wants them, then new tokens. The last token
        is one that ends generation, unless max_new_tokens was reached. Raises EngineError."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether it can still compute."""
        ...

    async def close(self) -> None:
        """End it; no job may be running."""
        ...
