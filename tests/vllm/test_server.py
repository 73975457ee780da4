"""vLLM's OpenAI-compatible server with an export whose model code has been removed: without remote code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.data.tokenizer import Tokenizer

READY_S = 900
"""Loading takes under a minute of CPU time; a busy machine takes longer."""
PROMPT = [258, *b"def add(a, b):"]
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What does <|eos|> mean?"},
]
PADDED = 470
"""An id that the tokenizer does not have and the embedding does."""


class Server:
    """A running server."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.address, self.process, self.log = f"http://127.0.0.1:{port}", process, log

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps({"model": "tiny"} | body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=300)

    def post(self, path: str, **body: Any) -> Any:
        with self.open(path, body) as answer:
            return json.load(answer)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends with [DONE]."""
        with self.open(path, body | {"stream": True}) as answer:
            lines = [line.decode().strip().removeprefix("data: ") for line in answer if line.strip()]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def wait(self) -> None:
        """Until it is healthy."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with self.open("/health"):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        raise AssertionError(self.log.read_text(errors="replace")[-4000:])


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path]) -> Path:
    return exported()


@pytest.fixture(scope="module")
def server(
    model: Path, vllm_python: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("*.py"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-num-seqs", "4", "--max-model-len", "512", "--enforce-eager"]
    options = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment | options, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        running = Server(port, process, log)
        running.wait()
        yield running
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def expected(model: Path, ours: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    return ours(model, [PROMPT])[0]


GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 32}


def test_a_completion_is_that_of_our_model_code(server: Server, expected: dict[str, Any]) -> None:
    choice = server.post("/v1/completions", prompt=PROMPT, logprobs=0, **GREEDY)["choices"][0]
    assert choice["token_ids"] == expected["tokens"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


def test_a_completion_echoes_the_logprobs_of_its_prompt(server: Server, expected: dict[str, Any]) -> None:
    """What evaluation harnesses ask for."""
    choice = server.post("/v1/completions", prompt=PROMPT, echo=True, logprobs=0, max_tokens=1, temperature=0)
    logprobs = choice["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert logprobs[1 : len(PROMPT)] == pytest.approx(expected["prompt_logprobs"], abs=1e-4)


def test_a_streamed_completion_has_the_same_tokens_and_text(server: Server, expected: dict[str, Any]) -> None:
    events = server.stream("/v1/completions", prompt=PROMPT, **GREEDY)
    assert len(events) > 2
    assert [token for event in events for token in event["choices"][0]["token_ids"] or []] == expected["tokens"]
    whole = server.post("/v1/completions", prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_a_chat_has_the_ids_of_the_training_tokenizer(
    server: Server, model: Path, ours: Callable[..., list[dict[str, Any]]]
) -> None:
    answer = server.post("/v1/chat/completions", messages=MESSAGES, **GREEDY)
    prompt = Tokenizer.load(model).apply_chat(MESSAGES)
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ours(model, [prompt])[0]["tokens"]
    events = server.stream("/v1/chat/completions", messages=MESSAGES, **GREEDY)
    streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert streamed == answer["choices"][0]["message"]["content"]


def test_generation_ends_with_the_turn(server: Server, model: Path) -> None:
    """The ids come from generation_config.json; the bias makes the model choose the end."""
    for name in ("<|eos|>", "<|endoftext|>"):
        bias = {str(Tokenizer.load(model).special_ids[name]): 100}
        answer = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=8, logit_bias=bias)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 1


def test_padded_ids_are_never_emitted(server: Server, model: Path) -> None:
    assert Tokenizer.load(model).vocab_size <= PADDED
    options = {"max_tokens": 8, "temperature": 2.0, "ignore_eos": True, "return_token_ids": True}
    choice = server.post("/v1/completions", prompt=PROMPT, logit_bias={str(PADDED): 100}, **options)["choices"][0]
    assert len(choice["token_ids"]) == 8
    assert max(choice["token_ids"]) < Tokenizer.load(model).vocab_size
