"""Posts alarms to the address in an environment variable (logging.webhook_url_env), as JSON.

The address may hold a secret: it is in no configuration, no log line and no record of a run. A webhook can neither end
nor delay a run: posting happens on a thread of its own, and a failure is one line of the log.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

TIMEOUT_S = 10.0
_MAX_WAITING = 100
"""Messages; an alarm is rare, so more means that the address does not answer."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to any address, so it is an error like another."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Webhook:
    """Posts messages in order. `say` gets a line for each that fails, on the thread that calls a method."""

    def __init__(self, url: str, say: Callable[[str], None], timeout_s: float = TIMEOUT_S) -> None:
        self._url, self._say, self._timeout_s = url, say, timeout_s
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def post(self, message: Mapping[str, Any]) -> None:
        """Queue a message. Never waits and never raises."""
        self.report()
        try:
            self._waiting.put_nowait(json.dumps(message).encode())
        except queue.Full:
            self._say(f"WARNING: the webhook is {_MAX_WAITING} messages behind: an alarm was not posted")

    def report(self) -> None:
        """Say what has failed since the last call."""
        while not self._failures.empty():
            self._say(f"WARNING: an alarm was not posted to the webhook: {self._failures.get()}")

    def close(self) -> None:
        """Give what is queued `timeout_s` to be posted, and as long again first if the queue is full."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=self._timeout_s)
            self._thread.join(self._timeout_s)
        self.report()
        if self._thread.is_alive():
            self._say(f"WARNING: the webhook was not done after {self._timeout_s:g} s: alarms were not posted")

    def _work(self) -> None:
        while (body := self._waiting.get()) is not None:
            if (failure := self._post(body)) is not None:
                self._failures.put(failure)

    def _post(self, body: bytes) -> str | None:
        """What went wrong, without the address; None if nothing did."""
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout_s):
                return None
        except urllib.error.HTTPError as error:
            return f"status {error.code}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason: object = getattr(error, "reason", error)
            # an error's own text may hold the address; that of a wrong certificate does
            words = None if isinstance(reason, ssl.SSLError) else getattr(reason, "strerror", None)
            return type(reason).__name__ + (f": {words}" if words else "")


def from_variable(name: str | None, say: Callable[[str], None]) -> Webhook | None:
    """The webhook at the address in environment variable `name`. None, with a line, if there is no usable address."""
    if name is None:
        return None
    url = os.environ.get(name, "").strip()
    if not url:
        say(f"WARNING: logging.webhook_url_env: {name} is not set on rank 0: alarms are only logged")
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        say(f"WARNING: logging.webhook_url_env: {name} holds no http or https address: alarms are only logged")
        return None
    return Webhook(url, say)
