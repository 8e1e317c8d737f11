"""Which headers cross the router, to an engine and back to its caller. Pure.

Rules this file keeps:
- what belongs to one hop stays on it, and the router speaks to an engine in its own name;
- nothing that a caller is known by elsewhere reaches an engine: cookies, credentials, addresses;
- names are remembered up to a bound, in number and in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from runtime.engine.guard import CLOSED_HEADER, MODEL_HEADER
from runtime.router.call.request import Call
from runtime.router.proxy.upstream import Headers

_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
# The body was read whole and inflated; the router speaks to the engine in its own name. By
# SageMaker's headers vLLM would put another adapter into the body than the one that was let in.
_NOT_SENT = _HOP_BY_HOP | {
    b"host", b"authorization", b"x-api-key", b"content-length", b"content-encoding", b"expect",
    b"x-request-id", b"x-amzn-sagemaker-adapter-identifier", b"x-amzn-sagemaker-adapter-alias",
    b"x-amzn-sagemaker-session-id",
    MODEL_HEADER,
}  # fmt: skip
# Nor what a caller's own proxy, browser or other services know it by: an engine reads none of it.
_PRIVATE = (
    b"auth", b"cookie", b"token", b"secret", b"password", b"credential", b"api-key", b"forwarded",
    b"x-real-ip", b"origin", b"referer",
)  # fmt: skip
# Which pages may read an answer is for the router to say: vLLM says "all".
_NOT_RETURNED = _HOP_BY_HOP | {
    b"x-request-id", b"access-control-allow-origin", b"access-control-allow-credentials",
    b"access-control-expose-headers",
}  # fmt: skip
# nginx would keep a stream back until it has 8 KiB of it.
UNBUFFERED = (b"X-Accel-Buffering", b"no")
_FIXED = (b"content-length", b"content-encoding")  # of a body that nothing can be added to
_OF_BODY = (b"content-type", b"content-length", b"content-encoding")
_NAMES = 1024  # header names remembered; there are a few dozen
_NAME_BYTES = 64  # of one that is remembered


def sent_headers(call: Call, key: str) -> list[bytes]:
    """The header lines for the engine, whose route key is `key`."""
    lines = [b"%b: %b" % header for header in _passed(call.headers, not_sent)]
    lines.append(b"Authorization: Bearer %b\r\nX-Request-ID: %b\r\nX-Stoker-Model: %b" % (
        key.encode(), call.request_id.encode(), call.model.encode()
    ))  # fmt: skip
    return lines


def returned_headers(raw: Headers, call: Call) -> Headers:
    """The headers for the caller, of an answer with these."""
    headers = _passed(raw, _not_returned) + own_headers(call)
    if call.head.stream:
        headers.append(UNBUFFERED)
    return headers


def without_body(headers: Headers) -> Headers:
    """All but those that describe a body, where another is sent in its place."""
    return [header for header in headers if header[0].lower() not in _OF_BODY]


def own_headers(call: Call) -> Headers:
    """The call's id, and which model answers where a route chose it."""
    if call.attempt is None:
        return [(b"X-Request-ID", call.request_id.encode())]
    return [
        (b"X-Request-ID", call.request_id.encode()),
        (b"X-Stoker-Model", call.model.encode()),
    ]


def is_open_stream(headers: Headers) -> bool:
    """Whether events can be added to an answer with these."""
    shown = {name.lower(): value for name, value in headers}
    kind = shown.get(b"content-type", b"")
    return kind.startswith(b"text/event-stream") and shown.keys().isdisjoint(_FIXED)


def is_closed(headers: Headers) -> bool:
    """Whether the engine did not let the request in, as it is asleep or about to sleep."""
    return any(name.lower() == CLOSED_HEADER for name, _ in headers)


class _Dropped(dict[bytes, bool]):
    """Whether a header of that name, as it is written, is not passed on: one look-up."""

    def __init__(self, names: set[bytes], words: tuple[bytes, ...] = ()) -> None:
        super().__init__()
        self._names = names
        self._words = words

    def __missing__(self, name: bytes) -> bool:
        lower = name.lower()
        dropped = lower in self._names or any(word in lower for word in self._words)
        if len(self) < _NAMES and len(name) <= _NAME_BYTES:
            self[name] = dropped
        return dropped


not_sent = _Dropped(_NOT_SENT, _PRIVATE)
_not_returned = _Dropped(_NOT_RETURNED)


def _passed(raw: Iterable[tuple[bytes, bytes]], dropped: _Dropped) -> Headers:
    """The headers that are not of this hop only."""
    options = b""
    kept = []
    for header in raw:
        if not dropped[header[0]]:
            kept.append(header)
        elif header[0].lower() == b"connection" and header[1].lower() != b"keep-alive":
            options += header[1].lower() + b","
    if options:
        named = {option.strip() for option in options.split(b",")}
        kept = [header for header in kept if header[0].lower() not in named]
    return kept
