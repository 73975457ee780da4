"""Starts a server: everything that can be refused is refused before a weight is read."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.exports import load_local, read_positions, refuse_folder, system_prompt_of
from hunyuan_pretrain.serving.guard import Guard, is_loopback, read_key
from hunyuan_pretrain.serving.service import Limits, Service
from hunyuan_pretrain.serving.vocabulary import Vocabulary

if TYPE_CHECKING:
    import uvicorn

    from hunyuan_pretrain.serving.generation import Engine

__all__ = ["Options", "serve"]

MOST_CONNECTIONS = 1024

HEADER_S = 30.0
"""How long a connection may take to send the header of a request."""
GRACE_S = 5
"""For answers that are being sent when the server is told to end."""


@dataclass(frozen=True)
class Options:
    """Of the command `serve`."""

    export: Path
    engine: str = "transformers"
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    name: str | None = None
    """Of the model in the API; None: that of the folder."""
    system: str | None = None
    """Of chats that have no system message, "" for none; None: that with which the model was fine-tuned."""
    lora: Path | None = None
    api_key_file: Path | None = None
    device: str = "cpu"
    running: int = 4
    waiting: int = 124
    max_new_tokens: int | None = None
    body_mib: int = 16
    vllm_python: Path | None = None
    vllm_options: Sequence[str] = ()


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. say: gets the address. Raises ServingError, CheckpointError, DataFormatError."""
    refuse_folder(options.export)
    key = read_key(options.api_key_file, options.host)
    positions = read_positions(options.export)
    with bind(options.host, options.port) as listener:
        vocabulary = Vocabulary(options.export)
        system = system_prompt_of(options.system, vocabulary, options.lora)
        engine, positions = start_engine(options, vocabulary, positions)
        limits = Limits(
            positions,
            min(options.max_new_tokens or positions, positions),
            options.running + options.waiting,
            options.body_mib * 2**20,
        )
        name = options.name or options.export.resolve().name
        server = web_server(Service(name, engine, vocabulary, limits, system), Guard(options.host, key))
        listen(listener, options.host, options.port)
        say(f"{name} at {address_of(listener)}/" + ("" if key is None else ", with the key"))
        server.run(sockets=[listener])


def start_engine(options: Options, vocabulary: Vocabulary, positions: int) -> tuple[Engine, int]:
    """A loaded engine and the positions that it allows. Raises ServingError, CheckpointError."""
    if options.engine == "vllm":
        if options.lora is not None:
            raise ServingError(
                f"--engine vllm --lora {options.lora}: vLLM gets merged weights here: hunyuan-pretrain merge-lora "
                f"{options.export} {options.lora} OUT, then serve OUT"
            )
        from hunyuan_pretrain.serving.vllm_engine import VllmEngine

        python, given = options.vllm_python, options.vllm_options
        child = VllmEngine(options.export, python, given, vocabulary.size, vocabulary.stop_ids)
        return child, min(positions, child.positions)
    if options.vllm_options or options.vllm_python is not None:
        raise ServingError("options for vLLM need --engine vllm")
    from hunyuan_pretrain.serving.local_engine import Worker

    model = load_local(options.export, options.lora, options.device, vocabulary)
    return Worker(model.steps, options.running), positions


def web_server(service: Service, guard: Guard) -> uvicorn.Server:
    """A server of HTTP/1.1 that has not started."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from hunyuan_pretrain.serving.api import build_app

    class Impatient(H11Protocol):
        """Closes a connection on which no whole request header comes: uvicorn would wait for ever."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_request()

        def _expect_request(self) -> None:
            self.loop.call_later(HEADER_S, self._close_without_request, self.cycle)

        def _close_without_request(self, before: Any) -> None:
            if self.cycle is before and (before is None or before.response_complete):
                self.transport.close()

    config = uvicorn.Config(
        build_app(service, guard),
        http=Impatient,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ServingError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if is_loopback(host) and not is_loopback(str(address[0])):
            raise ServingError(f"--host {host}: it resolves to {address[0]}, which others reach")
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _no_address(host, port, error) from None
    return listener


def listen(listener: socket.socket, host: str, port: int) -> None:
    """Accept connections from now on. Raises ServingError."""
    try:
        listener.listen(128)
    except OSError as error:
        raise _no_address(host, port, error) from None


def _no_address(host: str, port: int, error: OSError) -> ServingError:
    return ServingError(f"--host {host} --port {port}: {error.strerror}; another --port, or 0 for any that is free")


def address_of(listener: socket.socket) -> str:
    """As a URL without the slash at its end."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
