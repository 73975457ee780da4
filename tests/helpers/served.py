"""An export that is served by a thread of this process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hunyuan_pretrain.serving.generation import Engine
from hunyuan_pretrain.serving.guard import Guard
from hunyuan_pretrain.serving.server import address_of, bind, listen, web_server
from hunyuan_pretrain.serving.service import Limits, Service
from hunyuan_pretrain.serving.vocabulary import Vocabulary
from tests.helpers.tiny_export import export_tiny, tiny_model, write_tiny_tokenizer

POSITIONS = 4096


class Answered(NamedTuple):
    """An answer of the server."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class Served:
    """A running server."""

    def __init__(self, address: str, service: Service) -> None:
        self.address, self.service = address, service
        self.host, _, port = address.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Answered:
        """Send JSON, or bytes as they are; GET without a body."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"} | (headers or {}), method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return Answered(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Answered(error.code, error.headers, error.read())

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The answer to a completion that must succeed."""
        answer = self.ask("/v1/completions", {"model": self.service.name, "prompt": prompt} | fields)
        assert answer.status == 200, answer.body
        return answer.json

    def chat(self, *texts: str, **fields: Any) -> dict[str, Any]:
        """The answer to a chat of these turns that must succeed."""
        answer = self.ask("/v1/chat/completions", self.chat_body(*texts, **fields))
        assert answer.status == 200, answer.body
        return answer.json

    def chat_body(self, *texts: str, **fields: Any) -> dict[str, Any]:
        turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
        return {"model": self.service.name, "messages": turns} | fields

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which ends with [DONE]."""
        answer = self.ask(path, body | {"stream": True})
        assert answer.status == 200, answer.body
        lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def wait_until_free(self, seconds: float = 30) -> None:
        """Until no answer is computed or waits."""
        end = time.monotonic() + seconds
        while self.service.taken and time.monotonic() < end:
            time.sleep(0.01)
        assert self.service.taken == 0


def served_export(folder: Path) -> Path:
    """The export of a random model of four layers with the tiny tokenizer."""
    (folder / "tokenizer").mkdir()
    model = tiny_model(num_layers=4, hidden_size=64, kv_channels=32, ffn_hidden_size=96)
    export_tiny(model, write_tiny_tokenizer(folder / "tokenizer"), folder / "tiny", max_position_embeddings=POSITIONS)
    return folder / "tiny"


@contextlib.contextmanager
def serving(
    engine: Engine,
    vocabulary: Vocabulary,
    key: str | None = None,
    host: str = "127.0.0.1",
    system: str = "",
    **limits: Any,
) -> Iterator[Served]:
    """A server on a free port, ended at the end."""
    bounds = Limits(**({"positions": POSITIONS, "new_tokens": 2048} | limits))
    service = Service("tiny", engine, vocabulary, bounds, system)
    with bind(host, 0) as listener:
        server = web_server(service, Guard(host, key))
        listen(listener, host, 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            served = Served(address_of(listener), service)
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield served
        finally:
            server.should_exit = True
            thread.join()


def raw(port: int, sent: bytes, host: str = "127.0.0.1", timeout: float = 60) -> bytes:
    """What a server answers to these bytes, until it closes the connection."""
    with socket.create_connection((host, port), timeout=timeout) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := connection.recv(65536):
                received += part
        return received
