"""The webhook: what is posted, and that nothing it does ends, delays or discloses anything."""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import LoggingConfig
from hunyuan_pretrain.runtime.logging import RunLog
from hunyuan_pretrain.runtime.webhook import Webhook, from_variable

VARIABLE = "TEST_ALARM_WEBHOOK"


class Server(ThreadingHTTPServer):
    """Keeps what is posted; /status/N answers N, /moved redirects, /slow does not answer in time."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.posted: list[tuple[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.is_over = threading.Event()


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, json.loads(body)))
        if self.path == "/slow":
            self.server.is_over.wait(30)
        self.send_response(302 if self.path == "/moved" else int(self.path.rpartition("/")[2] or 200))
        if self.path == "/moved":
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.is_over.set()
        server.shutdown()
        thread.join()


def test_alarms_and_failures_are_posted_and_other_events_are_not(server, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(VARIABLE, f"{server.url}/")
    settings = LoggingConfig(tensorboard=False, wandb="disabled", webhook_url_env=VARIABLE)
    log = RunLog(tmp_path, settings, "a run", is_writer=True)
    log.open_sinks({})
    log.event("saved", "complete after 1 s", 10)
    log.event("alarm", "2 dead experts", 11)
    log.event("failed", "TrainingError: step 12: loss nan")
    log.close()
    assert [(body["kind"], body["step"], body["text"]) for _, body in server.posted] == [
        ("alarm", 11, "2 dead experts"),
        ("failed", None, "TrainingError: step 12: loss nan"),
    ]
    assert server.posted[0][1].keys() == {"run", "run_dir", "host", "time", "kind", "step", "text"}
    assert (server.posted[0][1]["run"], server.posted[0][1]["run_dir"]) == ("a run", str(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["saved", "alarm", "failed"]
    assert capsys.readouterr().out == "ALARM at step 11: 2 dead experts\n"


def test_other_ranks_post_nothing(server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{server.url}/")
    log = RunLog(tmp_path, LoggingConfig(webhook_url_env=VARIABLE), "n", is_writer=False)
    log.open_sinks({})
    log.event("alarm", "x", 1)
    log.close()
    assert server.posted == []


def test_a_wrong_certificate_is_one_line_without_the_address(monkeypatch) -> None:
    """OpenSSL's own text holds the host's name."""
    lines: list[str] = []
    host = "secret.example"
    error = ssl.SSLCertVerificationError(1, f"Hostname mismatch, certificate is not valid for '{host}'.")

    def refused(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError(error)

    webhook = Webhook(f"https://{host}/", lines.append)
    monkeypatch.setattr(webhook._opener, "open", refused)
    webhook.post({"text": "x"})
    webhook.close()
    assert lines == ["WARNING: an alarm was not posted to the webhook: SSLCertVerificationError"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/status/404", "status 404"), ("/moved", "status 302"), ("/slow", "TimeoutError"), (":1/closed", "")],
)
def test_a_failure_is_one_line_without_the_address(server, path: str, reason: str) -> None:
    lines: list[str] = []
    url = f"{server.url}{path}" if path.startswith("/") else "http://127.0.0.1:1/secret-token"
    webhook = Webhook(url, lines.append, timeout_s=0.5)
    started = time.monotonic()
    webhook.post({"text": "x"})
    assert time.monotonic() - started < 0.2, "posting does not wait"
    webhook.close()
    assert len(lines) >= 1
    text = "\n".join(lines)
    assert reason in text or "was not done" in text, "a connection that times out may outlast the close"
    assert "127.0.0.1" not in text
    assert "secret" not in text
    assert [path for path, _ in server.posted] == ([path] if path.startswith("/") else []), "no redirect is followed"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is not set on rank 0"),
        ("file:///etc/passwd", "holds no http or https address"),
        ("ftp://secret.example/x", "holds no http or https address"),
        ("http://[bad", "holds no http or https address"),
        ("https://", "holds no http or https address"),
    ],
)
def test_a_variable_without_a_usable_address_is_one_line_that_does_not_show_it(monkeypatch, value, words) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    lines: list[str] = []
    assert from_variable(VARIABLE, lines.append) is None
    assert lines == [f"WARNING: logging.webhook_url_env: {VARIABLE} {words}: alarms are only logged"]
    assert from_variable(None, lines.append) is None
