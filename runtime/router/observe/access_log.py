"""One line of JSON for each call: who asked for what, and what became of it.

Rules this file keeps:
- no body, prompt, key or header is written, and no query of a path;
- a call costs one encoding and an append: the disk is a thread's affair, which writes once a
  second and at the end, whole lines only (several workers may share a file);
- a disk that does not keep up costs lines, which are counted and told of, never memory or calls;
- the file that is written to is the one of that name: after `mv`, a new one is begun.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from runtime.router.call.outcome import NAME_CHARS, Outcome

log = logging.getLogger("stoker.router")

STDOUT = "-"
FLUSH_S = 1.0
KEPT_LINES = 65536  # that wait for the disk, of about 400 bytes

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class LogLine(Struct):
    """What a line holds. Times in seconds; null: unknown, or it did not come to that."""

    time: datetime  # of the arrival, UTC
    request_id: str
    client: str
    method: str
    path: str
    status: int
    error: str | None = None
    tenant: str | None = None
    key_id: str | None = None
    model: str | None = None
    version: str | None = None
    replica: str | None = None
    rung: str | None = None
    held_s: float = 0.0
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens_exact: bool = False
    bytes: int = 0
    trace_id: str | None = None
    cached: bool = False  # answered from the response cache


_encode = msgspec.json.Encoder().encode


def line_of(outcome: Outcome, arrived: float) -> LogLine:
    """`arrived` is a Unix time."""
    call, usage, ttft_s = outcome.call, outcome.usage, outcome.ttft_s
    return LogLine(
        datetime.fromtimestamp(arrived, UTC),
        call.request_id,
        call.address,
        "POST",
        (call.asked or call.path).partition("?")[0],
        outcome.status,
        outcome.error or None,
        call.caller.tenant,
        call.caller.key_id,
        outcome.model or call.model[:NAME_CHARS],
        call.version or None,
        outcome.replica_id or None,
        outcome.rung or None,
        round(outcome.held_s, 6),
        None if ttft_s is None else round(ttft_s, 6),
        round(outcome.total_s, 6),
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.exact,
        outcome.size_bytes,
        trace_id_of(call.headers) if outcome.trace is None else outcome.trace.trace_id,
        outcome.cached,
    )


def trace_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The id in a W3C traceparent header."""
    for name, value in headers:
        if len(name) == 11 and name.lower() == b"traceparent":
            match = _TRACEPARENT.match(value)
            return match[1].decode() if match else None
    return None


class AccessLog:
    """Writes to the file at `path`, or to standard output for "-", from `start` to `close`.

    Raises OSError where the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = 1 if path == STDOUT else _opened(path)
        self._lines: deque[bytes] = deque()
        self._lost = self._told = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left. Blocks."""
        self._ended.set()
        self._thread.join(timeout=5.0)  # a pipe that nobody reads must not keep the router
        if self._path != STDOUT and not self._thread.is_alive():
            os.close(self._file)

    def __call__(self, outcome: Outcome) -> None:
        """A call is over."""
        self.add(line_of(outcome, time.time() - outcome.total_s))

    def add(self, line: LogLine) -> None:
        """Write `line` soon."""
        if len(self._lines) < KEPT_LINES:
            self._lines.append(_encode(line))
        else:
            self._lost += 1

    # -- in the thread

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(FLUSH_S)
            self._flush()

    def _flush(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        try:
            if self._path != STDOUT:
                self._follow()
            _write(self._file, lines)
        except OSError as error:
            log.warning("access log %s: up to %d lines lost: %s", self._path, len(lines), error)
        if (lost := self._lost) > self._told:
            log.warning("access log %s: too slow, %d lines lost", self._path, lost - self._told)
            self._told = lost

    def _follow(self) -> None:
        """To the file that has the name now."""
        ours = os.fstat(self._file)
        with contextlib.suppress(FileNotFoundError):
            theirs = os.stat(self._path)
            if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
                return
        before, self._file = self._file, _opened(self._path)
        os.close(before)


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        reason = f"router.access_log: cannot write {path!r}: {error.strerror}"
        raise OSError(reason) from None


def _write(file: int, lines: list[bytes]) -> None:
    left = memoryview(b"\n".join((*lines, b"")))
    while left:
        left = left[os.write(file, left) :]
