"""Malformed and hostile requests get a status from 400 to 499 and change nothing."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.serving.api_requests import ChatRequest, CompletionRequest, parse
from hunyuan_pretrain.serving.errors import RequestError, ServingError
from hunyuan_pretrain.serving.guard import Guard, is_loopback, read_key
from hunyuan_pretrain.serving.local_engine import LocalModel, Worker
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.served import Served, raw, serving

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
KEY = "a-key-of-24-characters.."


@pytest.fixture(autouse=True)
def nothing_changed(served: Served) -> Iterator[None]:
    """After each test the server answers as before, and nothing is computed or waits."""
    before = served.chat("Hi", seed=1, max_tokens=4)["choices"]
    yield
    assert served.chat("Hi", seed=1, max_tokens=4)["choices"] == before
    assert served.service.taken == 0


BODIES: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"[]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b'{"model": "tiny"', "not JSON"),
    (b'{"model": "tiny", "messages": NaN}', "not JSON"),
    (b'{"model": "tiny", "temperature": Infinity}', "not JSON"),
    (b'{"model": "\xff"}', "not JSON"),
    (b'{"model": "\\ud800"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
    (b'{"model": "tiny", "messages": [], "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}', "temperature"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=[str(number) for number in range(len(BODIES))])
def test_what_is_no_json_object_is_refused(body: bytes, message: str, served: Served) -> None:
    answer = served.ask(CHAT, body)
    assert answer.status == 400
    assert message in answer.json["error"]["message"]
    assert len(answer.body) < 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "Hi"}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///x"}]}]},
            "parts",
        ),
        ({"messages": [{"role": "user", "content": "Hi", "name": "x"}]}, "not supported here: 'name'"),
        ({"messages": [*HI, *HI]}, "chat: message 2 has role 'user', expected 'assistant'"),
        ({"messages": [*HI, {"role": "assistant", "content": "Hello"}]}, "the last of the messages must be the user's"),
        ({"messages": [{"role": "assistant", "content": "Hello"}, *HI]}, "message 1 has role 'assistant'"),
        ({"model": "../../etc/passwd"}, "the model here is 'tiny'"),
        ({"model": 3}, "model: Input should be a valid string"),
        ({"n": 10**6}, "n: Input should be less than or equal to 32"),
        ({"n": True}, "n: Input should be a valid integer"),
        ({"n": "2"}, "n: Input should be a valid integer"),
        ({"max_tokens": 10**9}, "max_tokens=1000000000: this server allows 2048"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "two names of one limit"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature: 0 (always the likeliest token), or 0.01 to 2, is expected"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop: strings of 1 to 256 characters are expected"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True, "x": 1}}, "stream_options: not supported here: 'x'"),
        ({"tools": [], "__proto__": {}, "logit_bias": {}}, "not supported here: '__proto__', 'logit_bias', 'tools'"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(fields: dict[str, Any], message: str, served: Served) -> None:
    answer = served.ask(CHAT, {"model": "tiny", "messages": HI} | fields)
    assert answer.status == (404 if fields.get("model") == "../../etc/passwd" else 400)
    assert message in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": []}, "a prompt without a token"),
        ({"prompt": ["a"] * 33}, "text, token ids, or a list of up to 32 texts"),
        ({"prompt": ["a"] * 32, "n": 2}, "64 answers, prompts times n; at most 32"),
        ({"prompt": [[]]}, "a prompt without a token"),
        ({"prompt": [1, "a"]}, "text, token ids"),
        ({"prompt": [1, True]}, "text, token ids"),
        ({"prompt": [-1]}, "a token id is outside the vocabulary, 0 to 465"),
        ({"prompt": [466]}, "a token id is outside the vocabulary, 0 to 465"),
        ({"prompt": [10**30]}, "a token id is outside the vocabulary, 0 to 465"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 2, "suffix": "x"}, "not supported here: 'best_of', 'suffix'"),
        ({"prompt": "a" * 5000, "max_tokens": 1}, "but the model has 4096 positions"),
        ({"prompt": " " * 1_000_000}, "the text has more than 500000 tokens, but the model has 4096 positions"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(fields: dict[str, Any], message: str, served: Served) -> None:
    answer = served.ask(COMPLETE, {"model": "tiny"} | fields)
    assert answer.status == 400
    assert message in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "item"),
    [(CompletionRequest, b"[]"), (CompletionRequest, b"1.5"), (ChatRequest, b"7"), (ChatRequest, b"{}")],
)
def test_a_large_wrong_body_takes_no_more_memory_than_its_values(kind: type, item: bytes) -> None:
    """One message per value would take gigabytes."""
    field = b"prompt" if kind is CompletionRequest else b"messages"
    bodies = [b'{"model":"x","%s":[%s]}' % (field, b",".join([item] * 30_000))]
    bodies.append(b'{"model":"x",%s}' % b",".join(b'"%d":1' % number for number in range(30_000)))
    for body in bodies:
        tracemalloc.start()
        with pytest.raises(RequestError) as caught:
            parse(body, kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60 * len(body) + 10**6
        assert len(caught.value.message) < 500


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_a_body_of_a_gigabyte_is_refused_before_it_is_read(served: Served) -> None:
    answer = raw(
        served.port, head(CHAT, "Content-Type: application/json", "Content-Length: 1000000000") + b"{" * 100_000
    )
    assert status_of(answer) == 413


def test_a_body_in_chunks_is_refused_once_it_is_too_large(local: LocalModel, vocabulary: Vocabulary) -> None:
    with serving(Worker(local.steps, running=1), vocabulary, body_bytes=100_000, body_seconds=0.5) as small:
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        chunked = head(CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked") + 3 * chunk
        assert status_of(raw(small.port, chunked)) == 413
        slow = head(CHAT, "Content-Type: application/json", "Content-Length: 50") + b"{"
        assert status_of(raw(small.port, slow)) == 408
        assert small.chat("Hi", max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Type: text/plain"],
        ["Content-Type: application/x-www-form-urlencoded"],
        ["Content-Type: application/json", "Content-Encoding: gzip"],
        [],
    ],
)
def test_another_content_type_is_refused(lines: list[str], served: Served) -> None:
    """A page elsewhere can send these without asking first."""
    body = json.dumps({"model": "tiny", "messages": HI}).encode()
    sent = head(CHAT, f"Content-Length: {len(body)}", "Connection: close", *lines) + body
    assert status_of(raw(served.port, sent)) == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/redoc", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/../v1/models", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/page/chat.js", 404),
        ("GET", "http://evil.example/v1/models", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("POST", "/", 405),
    ],
)
def test_there_is_nothing_but_the_listed_paths(method: str, path: str, status: int, served: Served) -> None:
    answer = raw(served.port, head(path, "Connection: close", "Content-Length: 0", method=method))
    assert status_of(answer) == status
    assert b"access-control-allow" not in answer.lower()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Host: localhost"], 200),
        (["Host: 127.0.0.1:99"], 200),
        (["Host: [::1]:80"], 200),
        (["Host: LOCALHOST"], 200),
        (["Host: evil.example"], 421),
        (["Host: localhost.evil.example"], 421),
        (["Host: "], 421),
        (["Host: localhost:8000", "Origin: http://localhost:8000"], 200),
        (["Host: localhost:8000", "Origin: https://localhost:8000"], 200),
        (["Host: localhost:8000", "Origin: http://localhost:8001"], 403),
        (["Host: localhost", "Origin: http://evil.example"], 403),
        (["Host: localhost", "Origin: null"], 403),
        (["Host: localhost", "Origin: http://[bad"], 403),
        (["Host: localhost", "Origin: http://localhost", "Origin: http://localhost"], 403),
    ],
)
def test_a_page_of_another_site_does_not_reach_the_server(lines: list[str], status: int, served: Served) -> None:
    sent = "\r\n".join(["GET /v1/models HTTP/1.1", *lines, "Connection: close", "", ""]).encode()
    assert status_of(raw(served.port, sent)) == status


def test_with_a_key_only_the_page_and_health_are_open(local: LocalModel, vocabulary: Vocabulary) -> None:
    with serving(Worker(local.steps, running=1), vocabulary, key=KEY) as locked:
        body = {"model": "tiny", "messages": HI, "max_tokens": 1}
        for given in (None, "", f"Bearer {KEY}x", "Bearer ", f"Basic {KEY}", "Bearer \xe9"):
            headers = {} if given is None else {"Authorization": given}
            for path, sent in (
                ("/v1/models", None),
                (CHAT, body),
                (COMPLETE, b"x"),
                ("/v1/x", None),
                ("/x", None),
            ):
                answer = locked.ask(path, sent, headers)
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (given, path)
        assert locked.ask(CHAT, body, {"Authorization": f"Bearer {KEY}"}).status == 200
        assert locked.ask(CHAT, body, {"Authorization": f"bearer  {KEY}"}).status == 200
        assert locked.ask("/health").status == 200
        page = locked.ask("/")
        assert page.status == 200
        assert KEY.encode() not in page.body


def test_every_answer_carries_the_safe_headers(served: Served) -> None:
    for path in ("/", "/health", "/nothing", CHAT):
        headers = served.ask(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "server" not in headers


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", "")],
)
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_a_key_is_required_where_others_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUNYUAN_API_KEY", raising=False)
    assert read_key(None, "127.0.0.1") is None
    with pytest.raises(ServingError, match=r"--host 0.0.0.0: others reach this address, so a key is required"):
        read_key(None, "0.0.0.0")
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(file, "0.0.0.0") == KEY
    monkeypatch.setenv("HUNYUAN_API_KEY", "k" * 16)
    assert read_key(None, "127.0.0.1") == "k" * 16
    for text in ("", "short", "two words of a key that is long", "é" * 20):
        file.write_text(text)
        with pytest.raises(ServingError, match="one word of 16 or more printable ASCII characters"):
            read_key(file, "127.0.0.1")
    with pytest.raises(ServingError, match="cannot be read"):
        read_key(tmp_path / "none", "127.0.0.1")


def test_a_guard_of_an_address_for_others_takes_any_name_of_its_host() -> None:
    assert Guard("0.0.0.0", KEY)._names is None
    assert "127.0.0.5" in (Guard("127.0.0.5", None)._names or ())
