"""Which requests reach the server: a browser's page from elsewhere does not, and a request without the key does not.

A page of another site can send requests to a server on the reader's own machine. The check of Origin refuses them; the
check of Host refuses a page whose name resolves to this machine (DNS rebinding). No answer permits another origin to
read it.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hunyuan_pretrain.serving.errors import RequestError, ServingError

__all__ = ["KEY_VARIABLE", "Guard", "is_loopback", "read_key"]

KEY_VARIABLE = "HUNYUAN_API_KEY"
SHORTEST_KEY = 16
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(file: Path | None, host: str) -> str | None:
    """The key of the API, from the file or else from the environment variable HUNYUAN_API_KEY. Raises ServingError: a
    bad one, or none where others reach the server."""
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ServingError(f"--api-key-file {file}: cannot be read: {error}") from None
        where = f"--api-key-file {file}"
    else:
        key, where = os.environ.get(KEY_VARIABLE, "").strip(), KEY_VARIABLE
        if not key and is_loopback(host):
            return None
        if not key:
            raise ServingError(
                f"--host {host}: others reach this address, so a key is required: --api-key-file FILE or {KEY_VARIABLE}"
            )
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ServingError(
            f"{where}: a key is one word of {SHORTEST_KEY} or more printable ASCII characters, such as the output of "
            "python -c 'import secrets; print(secrets.token_hex(24))'"
        )
    return key


class Guard:
    """The checks before every request, and the headers of every answer."""

    def __init__(self, host: str, key: str | None) -> None:
        """host: the address that the server listens on. key: None for none."""
        self._names: frozenset[str] | None = LOOPBACK_NAMES | {host} if is_loopback(host) else None
        self._key = None if key is None else key.encode()

    def around(self, app: ASGIApp) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """The application behind these checks."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return

            async def send_safely(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    for name, value in SAFE_HEADERS.items():
                        headers.setdefault(name, value)
                await send(message)

            try:
                self._check(scope["path"], Headers(scope=scope))
            except RequestError as error:
                headers = {"Connection": "close"} | ({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})
                await JSONResponse(error.body(), error.status, headers)(scope, receive, send_safely)
                return
            await app(scope, receive, send_safely)

        return guarded

    def _check(self, path: str, headers: Headers) -> None:
        """Raises RequestError."""
        hosts = headers.getlist("host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        if self._names is not None and _name_of(host) not in self._names:
            raise RequestError(421, "this server answers to localhost and to the address that it listens on")
        origins = headers.getlist("origin")
        if origins and (len(origins) > 1 or not host or _host_of(origins[0]) != host):
            raise RequestError(403, "pages of other sites may not use this server")
        if self._key is not None and path not in ("/", "/health") and not self._has_key(headers):
            raise RequestError(401, "the key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key)


def _host_of(origin: str) -> str:
    """Name and port of an origin; "" for `null` and what is none."""
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """The name in a Host header, without the port and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
