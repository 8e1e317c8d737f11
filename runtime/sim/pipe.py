"""Bandwidth that several transfers share evenly: a disk, a network card. Pure.

With n transfers under way each gets 1/n of the rate. Let V be the bytes that *one* transfer which
was always there would have got: V grows at rate / n, and a transfer of b bytes that begins at V0
ends when V reaches V0 + b, however n changes meanwhile.

Worked example, 1 GB/s: A of 2 GB begins at 0 s, B of 1 GB at 1 s. At 1 s A has 1 GB left; both
get 0.5 GB/s, so both end at 3 s.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from runtime.sim.loop import Loop


class Transfer:
    """One transfer; `cancelled` ones end without a word."""

    __slots__ = ("cancelled", "done", "ends_at")

    def __init__(self, ends_at: float, done: Callable[[], object]) -> None:
        self.ends_at = ends_at  # in bytes of V
        self.done = done
        self.cancelled = False


class Pipe:
    """`rate` is in bytes per second."""

    def __init__(self, loop: Loop, rate: float) -> None:
        self._loop = loop
        self._rate = rate
        self._served = 0.0  # V
        self._seen_at = 0.0
        self._heap: list[tuple[float, int, Transfer]] = []
        self._made = 0
        self._active = 0
        self._plan = 0  # only the last planned wake-up counts

    def send(self, size_bytes: float, done: Callable[[], object]) -> Transfer:
        """Move so many bytes, then call `done`."""
        self._advance()
        self._made += 1
        transfer = Transfer(self._served + size_bytes, done)
        heappush(self._heap, (transfer.ends_at, self._made, transfer))
        self._active += 1
        self._wake_for_next()
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Stop it; the others get its share."""
        if not transfer.cancelled:
            self._advance()
            transfer.cancelled = True
            self._active -= 1
            self._wake_for_next()

    def set_rate(self, rate: float) -> None:
        """From now on it is that fast."""
        self._advance()
        self._rate = rate
        self._wake_for_next()

    def _advance(self) -> None:
        now = self._loop.now
        if self._active:
            self._served += (now - self._seen_at) * self._rate / self._active
        self._seen_at = now

    def _wake_for_next(self) -> None:
        while self._heap and self._heap[0][2].cancelled:
            heappop(self._heap)
        self._plan += 1
        if self._heap:
            wait_s = max(0.0, self._heap[0][0] - self._served) * self._active / self._rate
            self._loop.after(wait_s, self._due, self._plan)

    def _due(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        _, _, transfer = heappop(self._heap)
        self._served = max(self._served, transfer.ends_at)  # rounding must not undo progress
        transfer.cancelled = True  # a late cancel finds it over
        self._active -= 1
        self._wake_for_next()
        transfer.done()
