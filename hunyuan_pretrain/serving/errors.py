"""What a server refuses: a start that cannot succeed, and a request."""

from __future__ import annotations

__all__ = ["EngineError", "RequestError", "ServingError"]


class ServingError(ValueError):
    """A server or a chat that cannot start; the message says why and what to change."""


class EngineError(RuntimeError):
    """The engine could not compute an answer. Not the user's mistake."""


class RequestError(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        """status: of HTTP. param: the field that is wrong. retry_after: seconds, 0 for none."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, object]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
