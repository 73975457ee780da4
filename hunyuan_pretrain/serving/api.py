"""The HTTP interface: OpenAI's /v1/models, /v1/completions and /v1/chat/completions, /health, and the chat page at /.

There is nothing else: no schema, no documentation, no administration.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from hunyuan_pretrain.serving.answers import Entry, Piece, chat_logprobs, completion_logprobs
from hunyuan_pretrain.serving.api_requests import ChatRequest, CompletionRequest, parse
from hunyuan_pretrain.serving.api_requests import Request as Asked
from hunyuan_pretrain.serving.chat_page import ChatPage
from hunyuan_pretrain.serving.errors import EngineError, RequestError
from hunyuan_pretrain.serving.guard import Guard
from hunyuan_pretrain.serving.service import Prepared, Service

__all__ = ["build_app"]

CLIENT_HAS_GONE = 499
Result = TypeVar("Result")

log = logging.getLogger("hunyuan_pretrain.serving")


def build_app(service: Service, guard: Guard) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application. `guard` decides which requests reach it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await service.engine.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    page, started = ChatPage.load(), int(time.time())

    @app.get("/")
    async def chat_page() -> Response:
        return Response(page.html, media_type="text/html", headers=page.headers)

    @app.get("/health")
    async def health() -> Response:
        is_healthy = service.engine.is_healthy
        return JSONResponse({"status": "ok" if is_healthy else "the engine has ended"}, 200 if is_healthy else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        entry = {"id": service.name, "object": "model", "created": started, "owned_by": "hunyuan-pretrain"}
        lengths = {"max_model_len": service.limits.positions, "max_new_tokens": service.limits.new_tokens}
        return JSONResponse({"object": "list", "data": [entry | lengths | {"system_prompt": service.system}]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
        if error.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(EngineError)
    async def fail(_: Request, error: EngineError) -> Response:
        return JSONResponse(RequestError(500, str(error)).body(), 500)

    @app.exception_handler(HTTPException)
    async def no_such_path(_: Request, error: HTTPException) -> Response:
        return JSONResponse(RequestError(error.status_code, str(error.detail)).body(), error.status_code, error.headers)

    return guard.around(app)


async def _answer(service: Service, request: Request, kind: type[Asked]) -> Response:
    """Both endpoints: whole or streamed. Raises RequestError, EngineError."""
    asked = await asyncio.to_thread(parse, await _read_body(request, service), kind)
    if not service.engine.is_healthy:
        raise RequestError(503, "the engine has ended; the server's log says why")
    count = service.choices(asked)
    async with AsyncExitStack() as stack:
        stack.enter_context(service.room(count))
        writer = _Writer(service, asked, await service.prepare(asked))
        if asked.stream:
            return _EventStream(writer.events(), service.limits.send_seconds, stack.pop_all())
        whole = await _unless_gone(request.receive, writer.whole())
        return Response(status_code=CLIENT_HAS_GONE) if whole is None else JSONResponse(whole)


async def _read_body(request: Request, service: Service) -> bytes:
    """The body, if it is JSON by its header, not too large and not too slow. Raises RequestError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "the body must be plain JSON with Content-Type: application/json")
    most = service.limits.body_bytes
    length = request.headers.get("content-length", "0")
    too_large = RequestError(413, f"the body is larger than {most} bytes")
    if not length.isdecimal() or int(length[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(service.limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, "the body did not arrive in time") from None
    return b"".join(parts)


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """The result of `work`; None if the client goes before, which cancels it."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Writer:
    """The JSON of one request's answers, in OpenAI's form."""

    def __init__(self, service: Service, asked: Asked, prepared: Prepared) -> None:
        self._vocabulary, self._asked, self._prepared = service.vocabulary, asked, prepared
        self._is_chat = isinstance(asked, ChatRequest)
        prefix, kind = ("chatcmpl", "chat.completion") if self._is_chat else ("cmpl", "text_completion")
        streamed = ".chunk" if self._is_chat and asked.stream else ""
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind + streamed,
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self) -> dict[str, Any]:
        """All answers at once. Raises EngineError."""
        merged = [Piece() for _ in range(len(self._prepared))]
        async with aclosing(self._prepared.pieces()) as pieces:
            async for number, piece in pieces:
                merged[number].text += piece.text
                merged[number].entries += piece.entries
                merged[number].finish_reason = piece.finish_reason
        choices = []
        for number, piece in enumerate(merged):
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            text: dict[str, Any] = {"message": message} if self._is_chat else {"text": piece.text}
            choices.append(self._choice(number, text, piece.entries, piece.finish_reason))
        return self._head | {"choices": choices, "usage": self._prepared.usage.as_json()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. An error of the engine is the last event."""
        options = self._asked.stream_options
        usage: dict[str, Any] = {"usage": None} if options is not None and options.include_usage else {}
        if self._is_chat:
            for number in range(len(self._prepared)):
                first = {"delta": {"role": "assistant", "content": ""}}
                yield _event(self._head | {"choices": [self._choice(number, first, [], None)]} | usage)
        try:
            async with aclosing(self._prepared.pieces()) as pieces:
                async for number, piece in pieces:
                    has_text = bool(piece.text or piece.entries)
                    delta: dict[str, Any] = {"content": piece.text} if has_text else {}
                    text: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": piece.text}
                    choice = self._choice(number, text, piece.entries, piece.finish_reason)
                    if has_text or piece.finish_reason:
                        yield _event(self._head | {"choices": [choice]} | usage)
        except EngineError as error:
            yield _event(RequestError(500, str(error)).body())
            return
        if usage:
            yield _event(self._head | {"choices": [], "usage": self._prepared.usage.as_json()})
        yield b"data: [DONE]\n\n"

    def _choice(
        self, number: int, text: dict[str, Any], entries: list[Entry], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs_wanted is not None and (entries or not self._asked.stream):
            form = chat_logprobs if self._is_chat else completion_logprobs
            logprobs = form(self._vocabulary, entries)
        return {"index": number, **text, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n".encode()


class _EventStream(Response):
    """Sends events as they come. A client that goes, or that takes too long to read, ends the generation."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], send_seconds: float, held: AsyncExitStack) -> None:
        """held: closed at the end."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._send_seconds, self._held = events, send_seconds, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await _unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(self._send_seconds):
                await send(message)

        try:
            async with aclosing(self._events) as events:
                start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                await send_soon(start)
                async for event in events:
                    await send_soon({"type": "http.response.body", "body": event, "more_body": True})
            await send_soon({"type": "http.response.body", "body": b""})
        except TimeoutError:
            log.warning("a client did not read its answer for %g s; generation ended", self._send_seconds)
