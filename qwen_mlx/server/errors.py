"""Answers to requests that are not served, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused: the HTTP status, one sentence, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """{"error": ...} as OpenAI's API reference has it."""
        kind = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
