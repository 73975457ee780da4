"""vLLM as an engine: its own server, with this package's plugin, in a child that only this process reaches.

The child listens on a Unix-domain socket in a folder of this user, and wants a random key. It gets token ids and
returns token ids: prompts, stop strings, limits and text stay here, so control tokens in a text stay text.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx

from hunyuan_pretrain.serving.errors import EngineError, ServingError
from hunyuan_pretrain.serving.generation import Job, Scored

__all__ = ["VllmEngine"]

NAME = "model"
"""Of the model in the child."""
OURS = ("model", "served-model-name", "host", "port", "uds", "api-key", "config", "trust-remote-code", "enable-lora")
"""Options of vLLM's server that are set here, or that would let the code of a folder run."""
PROBE = """
import importlib.metadata, importlib.util, sys
if importlib.util.find_spec("vllm") is None:
    sys.exit(3)
names = [point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")]
sys.exit(0 if "hunyuan_pretrain" in names else 4)
"""
MISSING = {3: "vLLM is not installed", 4: "this package's plugin is not installed (pip install --no-deps .)"}
POLL_S, TERMINATE_S = 0.5, 30
TOKEN_ID = "token_id:"
"""Begins the name of a token in log-probabilities that are asked for by id."""


class VllmEngine:
    """An Engine; its constructor returns once the model is loaded."""

    def __init__(
        self, export: Path, python: Path | None, options: Sequence[str], vocab_size: int, stop_ids: Collection[int]
    ) -> None:
        """python: the interpreter that has vLLM; None for this one. options: for vLLM's server. Raises ServingError:
        an option that is set here, no vLLM, a child that ends while it loads."""
        refuse_options(options)
        interpreter = str(python or sys.executable)
        _refuse_without_vllm(interpreter)
        self._vocab_size, self._stop_ids = vocab_size, sorted(stop_ids)
        self._folder = Path(tempfile.mkdtemp(prefix="hunyuan-vllm-"))  # of this user only
        self._key = secrets.token_hex(24)
        self._client: httpx.AsyncClient | None = None
        socket = str(self._folder / "socket")
        command = [interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export.resolve())]
        environment = {
            "VLLM_API_KEY": self._key,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        atexit.register(self._stop)
        self._process = subprocess.Popen(
            [*command, "--served-model-name", NAME, "--uds", socket, *options],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._uds = socket
        self.positions = self._wait()

    @property
    def is_healthy(self) -> bool:
        """Whether the child runs."""
        return self._process.poll() is None

    async def run(self, job: Job) -> AsyncGenerator[list[Scored], None]:
        """As Engine.run."""
        left = job.max_new_tokens
        try:
            if job.scores_prompt:  # vLLM does not stream these
                scored, new = await self._whole(job)
                yield scored
                if left:
                    yield new[:left]
                return
            if not left:
                yield []
                return
            async with self._connected().stream("POST", "/v1/completions", json=self._body(job, True)) as answer:
                if answer.status_code != 200:
                    raise _refused(await answer.aread())
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield self._scores(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise EngineError(f"vLLM: {type(error).__name__}") from error

    async def close(self) -> None:
        """End the child."""
        if self._client is not None:
            await self._client.aclose()
        await asyncio.to_thread(self._stop)

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=self._uds, limits=httpx.Limits(max_connections=None)),
                base_url="http://vllm",
                headers={"Authorization": f"Bearer {self._key}"},
                timeout=None,
            )
        return self._client

    def _body(self, job: Job, is_streamed: bool) -> dict[str, Any]:
        sampling = job.sampling
        body: dict[str, Any] = {
            "model": NAME,
            "prompt": list(job.prompt),
            "max_tokens": max(job.max_new_tokens, 1),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": sampling.seed,
            "stop_token_ids": self._stop_ids,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "stream": is_streamed,
        }
        if job.top_logprobs is not None:
            body |= {"logprobs": job.top_logprobs, "return_tokens_as_token_ids": True}
        if job.scores_prompt:
            body["prompt_logprobs"] = job.top_logprobs
        return body

    async def _whole(self, job: Job) -> tuple[list[Scored], list[Scored]]:
        """Scores of the prompt, and of the new tokens."""
        answer = await self._connected().post("/v1/completions", json=self._body(job, False))
        if answer.status_code != 200:
            raise _refused(answer.content)
        choice = answer.json()["choices"][0]
        scored = [Scored(job.prompt[0], None)]
        for token, by_id in zip(job.prompt[1:], choice["prompt_logprobs"][1:], strict=True):
            logprobs = {int(number): entry["logprob"] for number, entry in by_id.items()}
            scored.append(Scored(token, logprobs[token], _best(logprobs.items(), job.top_logprobs or 0)))
        return scored, self._scores(answer.json())

    def _scores(self, answer: dict[str, Any]) -> list[Scored]:
        """New tokens of an answer or of an event."""
        if "error" in answer:
            raise EngineError("vLLM: an error while it computed; its log says more")
        found = []
        for choice in answer["choices"]:
            tokens, logprobs = choice.get("token_ids") or [], choice.get("logprobs")
            if any(token >= self._vocab_size for token in tokens):
                raise EngineError("vLLM chose an id that only pads the vocabulary; export in format hunyuan")
            if logprobs is None:
                found += [Scored(token, None) for token in tokens]
                continue
            for token, logprob, top in zip(
                tokens, logprobs["token_logprobs"], logprobs["top_logprobs"] or [{}] * len(tokens), strict=True
            ):
                by_id = [(int(name.removeprefix(TOKEN_ID)), value) for name, value in (top or {}).items()]
                found.append(Scored(token, logprob, _best(by_id, len(by_id))))
        return found

    def _wait(self) -> int:
        """Until the child answers; its positions."""
        transport = httpx.HTTPTransport(uds=self._uds)
        try:
            with httpx.Client(
                transport=transport, base_url="http://vllm", headers={"Authorization": f"Bearer {self._key}"}
            ) as client:
                while self._process.poll() is None:
                    with contextlib.suppress(httpx.HTTPError):
                        if client.get("/health").status_code == 200:
                            return int(client.get("/v1/models").json()["data"][0]["max_model_len"])
                    time.sleep(POLL_S)
        except BaseException:
            self._stop()
            raise
        status = self._process.returncode
        self._stop()
        raise ServingError(f"--engine vllm: vLLM ended with status {status} while it loaded; its messages are above")

    def _stop(self) -> None:
        """End the child and its processes; may be called again."""
        atexit.unregister(self._stop)
        if self._folder.exists() and hasattr(self, "_process"):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(TERMINATE_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def refuse_options(options: Sequence[str]) -> None:
    """Raise ServingError for an option of vLLM's server that is set here."""
    for option in options:
        name = option.partition("=")[0].lstrip("-").replace("_", "-")
        if option.startswith("-") and (name in OURS or name.startswith(("ssl-", "lora-", "api-"))):
            raise ServingError(f"{option}: not an option for vLLM here: `serve` sets it or its counterpart itself")


def _refuse_without_vllm(interpreter: str) -> None:
    try:
        status = subprocess.run([interpreter, "-c", PROBE], check=False).returncode
    except OSError as error:
        raise ServingError(f"--vllm-python {interpreter}: {error.strerror}") from None
    if status:
        what = MISSING.get(status, f"Python ended with status {status}")
        raise ServingError(
            f"--engine vllm: {interpreter}: {what}; --vllm-python names another interpreter (docs/guide/serving.md)"
        )


def _end_with_parent() -> None:
    """In the child, before it becomes vLLM: end if this process is killed (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _best(logprobs: Iterable[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    return sorted(logprobs, key=lambda each: -each[1])[:count]


def _refused(body: bytes) -> EngineError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "no reason given"
    return EngineError(f"vLLM refused a request: {str(message)[:300]}")
