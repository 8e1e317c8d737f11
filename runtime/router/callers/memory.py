"""The memory that one worker holds for its callers: one budget for all of it. Pure.

It counts the bytes of bodies that are being read or wait for their answer, of copies of them that
ask an engine for usage, of what was pipelined after them, and of the bodies and answers of jobs and
batches. Answers that are kept (`response_cache.py`) have their own bound, `router.cache_bytes`.

Rules this file keeps:
- beyond the budget nothing more is taken in: 503 with Retry-After, and what is there stays;
- one tenant's requests that wait for a model hold at most half of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from runtime.router.call.errors import CallError

RETRY_AFTER_S = 2.0
DEFAULT_BYTES = 512 * 2**20


class MemoryFull(CallError):
    """There is no room for it now."""

    def __init__(self, message: str) -> None:
        super().__init__(503, "memory_full", message, retry_after_s=RETRY_AFTER_S)


class Memory:
    """`used` of `limit` bytes are held. Who takes has to give back as much."""

    __slots__ = ("_held", "limit", "used")

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self._held: Counter[str] = Counter()  # by tenant

    def take(self, size_bytes: int) -> None:
        """Hold so much more. Raises MemoryFull: then nothing was taken."""
        if self.used + size_bytes > self.limit:
            raise MemoryFull(
                f"this router holds {self.used} bytes for its callers, of {self.limit} that it may "
                "(router.held_bytes)"
            )
        self.used += size_bytes

    def give(self, size_bytes: int) -> None:
        """So much is held no more."""
        self.used -= size_bytes

    @contextlib.contextmanager
    def taken(self, size_bytes: int) -> Iterator[None]:
        """Hold so much meanwhile. Raises MemoryFull."""
        self.take(size_bytes)
        try:
            yield
        finally:
            self.give(size_bytes)

    @contextlib.contextmanager
    def waiting(self, tenant: str, size_bytes: int) -> Iterator[None]:
        """A request of the tenant's waits; it was taken before. Raises MemoryFull."""
        if self._held[tenant] + size_bytes > self.limit // 2:
            raise MemoryFull(
                f"the requests of this tenant that wait hold {self._held[tenant]} bytes, and one "
                f"may have half of this router's {self.limit} (router.held_bytes)"
            )
        self._held[tenant] += size_bytes
        try:
            yield
        finally:
            self._held[tenant] -= size_bytes
            if not self._held[tenant]:
                del self._held[tenant]
