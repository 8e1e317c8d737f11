"""An error as a whole HTTP answer, for sockets that no library writes to. Pure."""

from __future__ import annotations

from http import HTTPStatus

from runtime.router.call.errors import CallError

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def error_answer(error: CallError, target: str, request_id: str) -> bytes:
    """A whole answer, headers and all, for a caller of the path `target`."""
    body = error.body(target, request_id)
    extra = "".join(f"{name}: {value}\r\n" for name, value in error.headers().items())
    reason = REASONS.get(error.status, b"").decode()
    head = (
        f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\n{extra}\r\n"
    )
    return head.encode() + body
