"""Gets one file: ranges from several sources at once, written in order, hashed on the way.

Rules this file keeps:
- ranges arrive in any order but are written in order, so a partial file is always a prefix: it can
  be gone on from, and its hash needs no second read of what this run wrote;
- a file is in the store only with the hash that its name says;
- memory is bounded: at most `WINDOW` ranges of a file are under way or waiting to be written.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from agent.cache.errors import SourceError
from agent.cache.policy import pick_source
from agent.cache.sources import RemoteFile, Source

RANGE_BYTES = 8 * 2**20
WINDOW = 8


class Fetch:
    """One file, from any of `sources`, into `part`."""

    def __init__(
        self,
        file: RemoteFile,
        sources: Sequence[Source],
        part: Path,
        executor: Executor,
        stop: threading.Event,
        on_bytes: Callable[[int], None],
    ) -> None:
        """`on_bytes` is called from this file's thread, with what `part` gained."""
        self.failed: dict[str, SourceError] = {}  # by name of the source
        self.used: set[str] = set()
        self._file = file
        self._sources = {source.name: source for source in sources}
        self._part = part
        self._executor = executor
        self._stop = stop
        self._on_bytes = on_bytes
        self._resumed = False
        self._digest = hashlib.sha256()
        self._claimed = _claimed_digest(file)

    def run(self) -> str:
        """Blocks until `part` is the whole file; its sha256.

        Raises SourceError where no source is left, or the bytes are not what they were said to be
        (kind "corrupt": the part is gone then); OSError from writing.
        """
        try:
            return self._attempt()
        except SourceError as error:
            if error.kind != "corrupt" or not self._resumed:
                raise
        # What the earlier run left may have been the fault: nobody is blamed for that.
        self._on_bytes(-self._file.size_bytes)
        self._digest = hashlib.sha256()
        self._claimed = _claimed_digest(self._file)
        return self._attempt()

    def _attempt(self) -> str:
        with self._part.open("ab") as out:
            start = self._resume(out.tell())
            if start < out.tell():
                out.truncate(start)
            self._copy(out.fileno(), start)
        return self._checked()

    def _resume(self, had: int) -> int:
        """Where to go on: after what an earlier run left, which is hashed now."""
        self._resumed = 0 < had <= self._file.size_bytes
        if not self._resumed:
            return 0
        with self._part.open("rb") as earlier:
            while block := earlier.read(RANGE_BYTES):
                self._hash(block)
        self._on_bytes(had)
        return had

    def _copy(self, out: int, start: int) -> None:
        ranges = deque(
            (at, min(RANGE_BYTES, self._file.size_bytes - at))
            for at in range(start, self._file.size_bytes, RANGE_BYTES)
        )
        free = [bytearray(RANGE_BYTES) for _ in range(min(WINDOW, len(ranges)))]
        under_way: deque[tuple[Future[None], bytearray, int]] = deque()
        try:
            while ranges or under_way:
                while free and ranges:
                    at, size = ranges.popleft()
                    buffer = free.pop()
                    view = memoryview(buffer)[:size]
                    under_way.append((self._executor.submit(self._range, at, view), buffer, size))
                future, buffer, size = under_way.popleft()
                future.result()
                self._write(out, memoryview(buffer)[:size])
                free.append(buffer)
        finally:
            for future, _, _ in under_way:
                future.cancel()

    def _range(self, at: int, view: memoryview) -> None:
        while True:
            if self._stop.is_set():
                raise SourceError("cancelled", "the pull was cancelled")
            name = pick_source(at // RANGE_BYTES, tuple(self._sources), tuple(self.failed))
            if name is None:
                raise next(iter(self.failed.values()))
            self.used.add(name)
            try:
                self._sources[name].read_into(self._file, at, view)
                return
            except SourceError as error:
                self.failed.setdefault(name, error)

    def _write(self, out: int, view: memoryview) -> None:
        writing = self._executor.submit(_write_all, out, view)
        try:
            self._hash(view)
        finally:
            writing.result()
        self._on_bytes(len(view))

    def _hash(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        if self._claimed is not None:
            self._claimed.update(data)

    def _checked(self) -> str:
        kind, _, wanted = self._file.check.partition(":")
        digest = self._digest if self._claimed is None else self._claimed
        if wanted and digest.hexdigest() != wanted:
            self._part.unlink(missing_ok=True)
            names = " and ".join(sorted(self.used)) or "an earlier run"
            raise SourceError(
                "corrupt",
                f"{self._file.path} from {names} is corrupt: its {kind} is"
                f" {digest.hexdigest()[:12]}…, not {wanted[:12]}…",
            )
        return self._digest.hexdigest()


def _write_all(out: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(out, view[done:])


def _claimed_digest(file: RemoteFile) -> Any:
    """The second hash that checks what the source claimed; None where sha256 does, or nothing."""
    if file.check.startswith("git-sha1:"):
        return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    if file.check.startswith("md5:"):
        return hashlib.md5(usedforsecurity=False)
    return None
