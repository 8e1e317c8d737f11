"""What a client is told when its call fails: one OpenAI-shaped error, everywhere.

Rule this file keeps: a message is written for the caller; it never holds a key or an engine's URL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


class ApiError(Exception):
    """A call that ends with `status`; `retry_after_s` becomes a Retry-After header."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self._headers = tuple(headers)

    def payload(self) -> dict[str, Any]:
        """The body, `{"error": {"message", "type", "param", "code"}}`."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def body(self) -> bytes:
        """The body as JSON."""
        return msgspec.json.encode(self.payload())

    def headers(self) -> dict[str, str]:
        """What it was given, and Retry-After in whole seconds, at least 1, where that is known."""
        headers = {name.decode(): value.decode() for name, value in self._headers}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def sse_error(payload: dict[str, Any]) -> bytes:
    """An error as the last events of a stream whose headers have already gone out."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\ndata: [DONE]\n\n"
