"""Lines of a batch: what a good one is, and what its result looks like, as OpenAI has both. Pure.

Rules this file keeps:
- what is wrong with a line is said with its number and its field;
- a line's body is passed on as it was written.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.call.body import read_head
from runtime.router.call.errors import CallError
from runtime.router.jobs.store.shapes import json_or_text

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000  # as OpenAI
MAX_CUSTOM_ID = 512
MAX_PROBLEMS = 100  # told of one file


class BatchLine(NamedTuple):
    """One good line."""

    custom_id: str
    model: str
    body: bytes


class Problem(NamedTuple):
    """What is wrong with one line, or (line None) with the file."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None

    def shown(self) -> dict[str, Any]:
        """As an entry of a batch's `errors`."""
        return self._asdict()


class _Read(msgspec.Struct):
    custom_id: str | None = None
    method: str | None = None
    url: str | None = None
    body: msgspec.Raw = msgspec.Raw()


_HEAD = ("custom_id", "method", "url")
_read: Callable[[bytes], _Read] = outside.reader(_Read)


def read_line(text: bytes, endpoint: str) -> BatchLine | Problem:
    """One line of an input file for a batch of `endpoint`."""
    try:
        read = _read(text)
    except OutsideError as error:
        if error.field in _HEAD:
            return _wrong(error.field, endpoint)
        return Problem("invalid_json_line", str(error))
    if not read.custom_id or len(read.custom_id) > MAX_CUSTOM_ID:
        return _wrong("custom_id", endpoint)
    if read.method != "POST":
        return _wrong("method", endpoint)
    if read.url != endpoint:
        return _wrong("url", endpoint)
    return _with_body(read.custom_id, bytes(read.body))


def _wrong(field: str, endpoint: str) -> Problem:
    if field == "custom_id":
        wanted = f"custom_id must be 1 to {MAX_CUSTOM_ID} characters, unique within the file"
        return Problem("missing_required_parameter", wanted, field)
    if field == "method":
        return Problem("invalid_method", 'method must be "POST"', field)
    return Problem("invalid_url", f"url must be {endpoint!r}, the batch's endpoint", field)


def _with_body(custom_id: str, body: bytes) -> BatchLine | Problem:
    if not body:
        return Problem("missing_required_parameter", "body is missing: the request itself", "body")
    try:
        head = read_head(body)
    except CallError as error:
        param = f"body.{error.param}" if error.param else "body"
        return Problem("invalid_request", error.message, param)
    if head.stream:
        return Problem("invalid_request", "a batch does not stream; leave it out", "body.stream")
    return BatchLine(custom_id, head.model, body)


class Check:
    """One file's lines, in order."""

    def __init__(self, endpoint: str, max_line_bytes: int) -> None:
        self._endpoint = endpoint
        self._max_line_bytes = max_line_bytes
        self._seen: dict[bytes, int] = {}  # digest of custom_id -> line: ids may take 100 MB
        self.problems: list[Problem] = []

    @property
    def count(self) -> int:
        """Good lines so far."""
        return len(self._seen)

    @property
    def given_up(self) -> bool:
        """Enough is wrong."""
        return len(self.problems) >= MAX_PROBLEMS

    def line(self, number: int, text: bytes) -> BatchLine | None:
        """The line, if it is good; else `problems` has grown."""
        found = self._checked(text)
        if isinstance(found, BatchLine):
            self._seen[_digest(found.custom_id)] = number
            return found
        self.problems.append(found._replace(line=number))
        return None

    def too_long(self, number: int) -> None:
        """A line of which more has come than may be."""
        wanted = f"may have at most {self._max_line_bytes} bytes (router.max_body_bytes)"
        self.problems.append(Problem("line_too_large", wanted, None, number))

    def end(self) -> None:
        """There are no more."""
        if not self._seen and not self.problems:
            self.problems.append(Problem("empty_file", "the input file has no lines"))

    def _checked(self, text: bytes) -> BatchLine | Problem:
        if len(self._seen) >= MAX_LINES:
            return Problem("too_many_tasks", f"a batch has at most {MAX_LINES} lines")
        found = read_line(text, self._endpoint)
        first = self._seen.get(_digest(found.custom_id)) if isinstance(found, BatchLine) else None
        if isinstance(found, BatchLine) and first is not None:
            message = f"custom_id {found.custom_id!r} is that of line {first} too"
            return Problem("duplicate_custom_id", message, "custom_id")
        return found


def _digest(custom_id: str) -> bytes:
    return blake2b(custom_id.encode(), digest_size=16).digest()


class Splitter:
    """Cuts a file that comes in pieces into its lines; one beyond `max_bytes` is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._start = 0  # of the line that is under way
        self._number = 1
        self._skipping = False

    def feed(self, data: bytes) -> list[tuple[int, int, bytes | None]]:
        """(number, where it starts, text) of each line that is whole now and not blank; the text is
        None where it is too long."""
        found: list[tuple[int, int, bytes | None]] = []
        *whole, self._rest = (self._rest + data).split(b"\n")
        for text in whole:
            self._cut(text, found)
            self._start += len(text) + 1
            self._number += 1
            self._skipping = False
        if len(self._rest) > self._max_bytes or self._skipping:
            self._cut(self._rest, found)
            self._start += len(self._rest)
            self._rest = b""
            self._skipping = True
        return found

    def end(self) -> list[tuple[int, int, bytes | None]]:
        """As `feed`, for a last line without its end."""
        return self.feed(b"\n")

    def _cut(self, text: bytes, found: list[tuple[int, int, bytes | None]]) -> None:
        if self._skipping or not text.strip():
            return
        found.append((self._number, self._start, text if len(text) <= self._max_bytes else None))


def answered(batch_id: str, line: int, custom_id: str, status: int, body: bytes) -> bytes:
    """An engine's answer as one line of an output or error file."""
    request_id = request_id_of(batch_id, line)
    response = {"status_code": status, "request_id": request_id, "body": json_or_text(body)}
    return _result(request_id, custom_id, response, None)


def unanswered(batch_id: str, line: int, custom_id: str, code: str, message: str) -> bytes:
    """A line that no engine answered, as one line of an error file."""
    error = {"code": code, "message": message}
    return _result(request_id_of(batch_id, line), custom_id, None, error)


def request_id_of(batch_id: str, line: int) -> str:
    """The request id that a line's call carries, at each attempt."""
    return f"{batch_id.replace('batch_', 'batch_req_')}_{line}"


def _result(request_id: str, custom_id: str, response: object, error: object) -> bytes:
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line)
