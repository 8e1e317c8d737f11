"""What a client is told when its call fails, in the protocol of its path.

Rule this file keeps: a message is written for the caller; it never holds a key or an engine's URL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.call.error_shapes import Failure, last_event, read, shape_of, whole

# Of the 4xx, those that the same request may not meet again a little later.
_PASSING = (408, 425, 429)


class CallError(Exception):
    """A call that ends with `status`.

    `retry_after_s`: when to come back, where that is known. `final`: coming back changes nothing;
    None: as the status has it, so for 4xx but for timeouts and limits.
    """

    def __init__(
        self,
        status: int,
        code: str | int | None,
        message: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
        final: bool | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = "" if code is None else str(code)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.final = (400 <= status < 500 and status not in _PASSING) if final is None else final
        self._failure = Failure(status, code, message, param, kind)
        self._headers = tuple(headers)

    def body(self, target: str = "", request_id: str = "") -> bytes:
        """The body for a caller of `target`, its path; without one as OpenAI has it."""
        return whole(shape_of(target), self._failure, request_id)

    def last_event(self, target: str, request_id: str, sent: bytes = b"") -> bytes:
        """The end of a stream already begun; `sent` as in `error_shapes.last_event`."""
        return last_event(shape_of(target), self._failure, request_id, sent)

    def headers(self) -> dict[str, str]:
        """What it was given, and whether and when to come back.

        `x-should-retry` and `retry-after-ms` are what OpenAI's and Anthropic's clients go by;
        Retry-After, in whole seconds, is at least 1.
        """
        headers = {name.decode(): value.decode() for name, value in self._headers}
        if self.final:
            headers["x-should-retry"] = "false"
        elif self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after_s * 1000)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def engine_error(status: int, body: bytes) -> CallError:
    """An engine's error answer, to be told in another shape."""
    try:
        failure = read(status, outside.json_document(body))
    except OutsideError:
        failure = read(status, None)
    return CallError(status, failure.code, failure.message, param=failure.param, kind=failure.kind)


def internal_error() -> CallError:
    """What is told of a failure of our own."""
    message = "the router failed; its log has more under this request id"
    return CallError(500, "internal_error", message)


def no_response(response_id: str, why: str = "", param: str = "response_id") -> CallError:
    """What is told of a response that is not known here, or is another tenant's."""
    message = f"there is no response {response_id[:128]!r} here{why}"
    return CallError(404, "response_not_found", message, param=param)
