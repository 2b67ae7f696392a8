"""Errors of requests, in OpenAI's format."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: what was given, what is allowed, what to do.
        status: of HTTP.
        param: the field of the request.
        code: a word for programs.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def to_dict(self) -> dict[str, Any]:
        """Return the body that clients of OpenAI's API read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Disconnected(Exception):
    """The client has closed its connection before the answer was complete."""
