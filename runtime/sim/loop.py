"""Virtual time: a heap of things to do. Pure.

Rules this file keeps:
- nothing reads a clock: time is what the next entry says;
- entries of one instant run in the order they were made, so a run depends on its inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[..., object]


class Loop:
    """`now` in seconds from the start; `events`: how many actions ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._made = 0

    def at(self, when_s: float, action: Action, *args: object) -> None:
        """Call `action(*args)` at `when_s`; at once, but later, where that is past."""
        self._made += 1
        when_s = max(when_s, self.now)
        heappush(self._heap, (when_s, self._made, action, args))

    def after(self, delay_s: float, action: Action, *args: object) -> None:
        """Call `action(*args)` in `delay_s`."""
        self._made += 1
        heappush(self._heap, (self.now + delay_s, self._made, action, args))

    def run(self, until_s: float, each: Callable[[], object] | None = None) -> None:
        """Do all that is due until `until_s`; `each` is called after every action."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now, _, action, args = heappop(heap)
            self.events += 1
            action(*args)
            if each is not None:
                each()
        self.now = max(self.now, until_s)
