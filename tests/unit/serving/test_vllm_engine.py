"""vLLM as a child, on a stand-in for its server; tests/vllm runs the real one."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.server import Options, start_engine
from hunyuan_pretrain.serving.vllm_engine import VllmEngine, refuse_options
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.served import Served, serving
from tests.helpers.vllm_stub import recorded, write_stub

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-in is the package vllm of every child."""
    folder = write_stub(tmp_path_factory.mktemp("vllm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        yield folder


@pytest.fixture(scope="module")
def engine(stub: Path, export: Path, vocabulary: Vocabulary) -> VllmEngine:
    started, positions = start_engine(Options(export, engine="vllm"), vocabulary, 4096)
    assert isinstance(started, VllmEngine)
    assert positions == 300, "what the child allows"
    return started


@pytest.fixture(scope="module")
def proxied(engine: VllmEngine, vocabulary: Vocabulary) -> Iterator[Served]:
    folder = engine._folder
    assert folder.stat().st_mode & 0o777 == 0o700
    with serving(engine, vocabulary, positions=300, new_tokens=200) as running:
        yield running
    assert not engine.is_healthy
    assert not folder.exists()


def test_the_child_gets_ids_and_the_text_is_made_here(proxied: Served, stub: Path, vocabulary: Vocabulary) -> None:
    body = proxied.chat_body("What is <|eos|>?", seed=5, max_tokens=12, stop="never", logprobs=True, top_logprobs=1)
    answer = proxied.ask("/v1/chat/completions", body).json
    prompt = vocabulary.encode_chat(body["messages"])
    asked = recorded(stub)[-1]
    assert asked["prompt"] == prompt
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["seed"]) == (0.7, 0.6, 20, 5)
    assert asked["repetition_penalty"] == 1.05
    assert asked["stop_token_ids"] == sorted(vocabulary.stop_ids)
    assert "stop" not in asked
    tokens = [(sum(prompt) + number) % 97 for number in range(12)]
    assert answer["choices"][0]["message"]["content"] == bytes(tokens).decode()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-token / 10 for token in tokens]
    assert answer["usage"]["completion_tokens"] == 12
    events = proxied.stream("/v1/chat/completions", body)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == bytes(tokens).decode()


def test_prompts_are_scored(proxied: Served) -> None:
    for most in (0, 3):
        answer = proxied.complete([258, 5, 7], echo=True, logprobs=1, max_tokens=most)["choices"][0]
        assert answer["logprobs"]["token_logprobs"][:3] == [None, -0.5, -0.7]
        assert answer["logprobs"]["top_logprobs"][2] == {"\x01": -0.5, "\x07": -0.7}
        assert len(answer["logprobs"]["tokens"]) == 3 + most
        assert answer["finish_reason"] == "length"


def test_no_new_tokens_are_an_answer_without_text(proxied: Served, stub: Path) -> None:
    before = len(recorded(stub))
    answer = proxied.complete([258, 5, 7], max_tokens=0)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert len(recorded(stub)) == before, "the child is not asked"


def test_generation_ends_at_a_control_token_and_at_a_stop_string(proxied: Served) -> None:
    answer = proxied.complete([258, 1], max_tokens=30)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 30)
    first = (258 + 65) % 97
    stop = bytes([first + 4, first + 5, first + 6]).decode()
    cut = proxied.complete([258, 65], max_tokens=20, stop=stop)["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (bytes(range(first, first + 4)).decode(), "stop")


def test_a_client_that_goes_ends_the_generation_in_the_child(proxied: Served, stub: Path) -> None:
    body = json.dumps({"model": "tiny", "prompt": [258, 42, 1], "max_tokens": 200}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    before = len(recorded(stub))
    with socket.create_connection(("127.0.0.1", proxied.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        while len(recorded(stub)) == before:
            time.sleep(0.005)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    proxied.wait_until_free()
    end = time.monotonic() + 20
    while recorded(stub)[-1] != "cancelled" and time.monotonic() < end:
        time.sleep(0.01)
    assert recorded(stub)[-1] == "cancelled"


def test_what_the_child_refuses_is_an_error_of_this_request_alone(proxied: Served) -> None:
    answer = proxied.ask("/v1/completions", {"model": "tiny", "prompt": [1], "seed": 400})
    assert (answer.status, answer.json["error"]["message"]) == (500, "vLLM refused a request: not today")
    assert proxied.complete([1], max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_child_that_ends_is_reported(stub: Path, export: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="vLLM ended with status 7 while it loaded; its messages are above"):
        start_engine(Options(export, engine="vllm", vllm_options=("--fail",)), vocabulary, 4096)


@pytest.mark.parametrize(
    "option",
    ["--port", "--host=0.0.0.0", "--trust-remote-code", "--trust_remote_code", "--api-key", "--uds", "--config"],
)
def test_options_that_are_set_here_are_refused(option: str) -> None:
    with pytest.raises(ServingError, match="not an option for vLLM here"):
        refuse_options(["--dtype", "float32", option])
    refuse_options(["--tensor-parallel-size", "8", "--kv-cache-dtype=fp8"])


def test_without_vllm_the_message_says_where_it_was_looked_for(
    export: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    for interpreter, message in ((python, "vLLM is not installed"), (tmp_path / "none", "No such file")):
        with pytest.raises(ServingError, match=message):
            start_engine(Options(export, engine="vllm", vllm_python=interpreter), vocabulary, 4096)
    with pytest.raises(ServingError, match="vLLM gets merged weights here: hunyuan-pretrain merge-lora"):
        start_engine(Options(export, engine="vllm", lora=tmp_path), vocabulary, 4096)
    with pytest.raises(ServingError, match="options for vLLM need --engine vllm"):
        start_engine(Options(export, vllm_options=("--dtype", "float32")), vocabulary, 4096)
