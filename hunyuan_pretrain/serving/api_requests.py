"""The bodies of /v1/completions and /v1/chat/completions: OpenAI's fields that this server honours, and two of vLLM's
(top_k, repetition_penalty). Any other field is refused: it would be without effect.

A body comes from anybody. Each check stops at the first fault of a field, so that a large body costs no more memory
than its own values.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from hunyuan_pretrain.serving.errors import RequestError
from hunyuan_pretrain.serving.generation import Sampling

__all__ = ["ChatRequest", "CompletionRequest", "Message", "Request", "parse"]

MOST_CHOICES = 32
"""Of one request: prompts times n."""
MOST_LOGPROBS = 20
MOST_MESSAGES = 4096
MOST_STOPS, LONGEST_STOP = 16, 256
SMALLEST_TEMPERATURE = 0.01
"""Other than 0. Dividing by less gives infinities."""

Body = TypeVar("Body", bound="Request")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [name for name in data if name not in cls.model_fields]
            if unknown:
                shown = ", ".join(repr(name[:40]) for name in sorted(unknown)[:5])
                raise ValueError(f"not supported here: {shown}" + (" and others" if len(unknown) > 5 else ""))
        return data


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool = False
    """A last event with the counts of tokens."""


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        """Text parts, which OpenAI allows in the place of a string, joined."""
        if not isinstance(value, list):
            return value
        is_text = all(
            isinstance(part, dict)
            and part.keys() == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
            for part in value
        )
        if not is_text:
            raise ValueError('a string, or parts {"type": "text", "text": ...}, is expected')
        return "".join(part["text"] for part in value)


class Request(_Strict):
    """What both endpoints take."""

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    """Answers to each prompt."""
    max_tokens: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63 - MOST_CHOICES)
    user: str | None = None
    """OpenAI's name for whom the answer is for; never stored."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _short_stops(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not all(0 < len(stop) <= LONGEST_STOP for stop in value):
            raise ValueError(f"strings of 1 to {LONGEST_STOP} characters are expected")
        return value

    @field_validator("temperature")
    @classmethod
    def _no_tiny_temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < SMALLEST_TEMPERATURE:
            raise ValueError(f"0 (always the likeliest token), or {SMALLEST_TEMPERATURE} to 2, is expected")
        return value

    @property
    @abstractmethod
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens beside each token's log-probability; None for neither."""

    @property
    def most_new_tokens(self) -> int | None:
        """As the request says; None if it does not."""
        return self.max_tokens

    def sampling(self, index: int) -> Sampling:
        """Of answer `index`. Without a field of the request the release's value holds, but a temperature of 0 alone
        means the likeliest token, without a penalty."""
        base = Sampling()
        temperature = base.temperature if self.temperature is None else self.temperature
        penalty = base.repetition_penalty if temperature else 1.0
        return Sampling(
            temperature=temperature,
            top_p=base.top_p if self.top_p is None else self.top_p,
            top_k=base.top_k if self.top_k is None else max(self.top_k, 0),
            repetition_penalty=penalty if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else self.seed + index,
        )


class CompletionRequest(Request):
    """The body of /v1/completions. A prompt of text is the beginning of a document; ids are taken as they are."""

    prompt: list[str] | list[list[int]]
    echo: bool | None = None
    """The answer's text begins with the prompt, and log-probabilities cover it."""
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @field_validator("prompt", mode="plain")
    @classmethod
    def _several_prompts(cls, value: Any) -> list[str] | list[list[int]]:
        prompts = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
        if len(prompts) <= MOST_CHOICES:
            if all(isinstance(prompt, str) for prompt in prompts):
                return prompts
            if all(isinstance(prompt, list) and all(type(token) is int for token in prompt) for prompt in prompts):
                return prompts
        raise ValueError(
            f"text, token ids, or a list of up to {MOST_CHOICES} texts or of up to {MOST_CHOICES} lists of token ids "
            "is expected"
        )

    @property
    def logprobs_wanted(self) -> int | None:
        """As Request."""
        return self.logprobs


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _no_contradiction(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one")
        if self.messages[-1].role != "user":
            raise ValueError("the last of the messages must be the user's")
        return self

    @property
    def logprobs_wanted(self) -> int | None:
        """As Request."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_new_tokens(self) -> int | None:
        """As Request."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(body: bytes, kind: type[Body]) -> Body:
    """The request in a body. Raises RequestError: not JSON, not UTF-8, nested too deep, a wrong field."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    place = [str(part) for part in faults[0]["loc"]]
    texts = dict.fromkeys(f"{_place(fault['loc'])}{fault['msg'].removeprefix('Value error, ')}" for fault in faults)
    raise RequestError(400, "; ".join(list(texts)[:5]), param=place[0] if place else None)


def _place(location: tuple[int | str, ...]) -> str:
    return f"{'.'.join(map(str, location))}: " if location else ""
