"""Figures over the last so many seconds, kept in bounded memory. Pure.

Each takes a *step function*: a value holds from when it was told until the next one is. So the
value in force when a window opened counts in it, however long ago it was told, and a caller that
tells only changes gets what one that tells every second gets.

Rules this file keeps: a clock that steps back is taken as standing still; an update is O(1)
amortized; nothing grows with the number of updates.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

MAX_MARKS = 64  # of a Mean: its resolution is a 64th of its window
MAX_CHANGES = 512  # of Changes: one in 3.5 s through the longest period (1,800 s)


@dataclass(slots=True)
class Extreme:
    """The least (`sign` 1) or the greatest (`sign` -1) value in force within a window.

    A monotonic queue: values that a later one outdoes are dropped at once, so it never holds more
    entries than there are different values (for replicas: `max_replicas`).
    """

    sign: int
    runs: deque[tuple[int, float]] = field(default_factory=deque)  # value, until when in force

    def push(self, now: float, value: int, window_s: float) -> int:
        """Put `value` in force and return the extreme over the last `window_s`.

        Worked example, the least over 60 s: 4 from t = 0, 2 from 10, 3 from 30. At 69 it is still
        2, which was in force until 30 and so within the window from 9; at 91 it is 3.
        """
        runs = self.runs
        if runs and runs[-1][1] == math.inf:
            runs[-1] = (runs[-1][0], now)
        while runs and (runs[-1][0] - value) * self.sign >= 0:
            runs.pop()
        runs.append((value, math.inf))
        while runs[0][1] <= now - window_s:
            runs.popleft()
        return runs[0][0]


@dataclass(slots=True)
class Mean:
    """The time-weighted mean within a window; what was before the first value counts as zero."""

    level: float = 0.0
    at: float | None = None
    total: float = 0.0  # the integral of the value up to `at`
    marks: deque[tuple[float, float]] = field(default_factory=deque)  # time, the integral then

    def push(self, now: float, level: float, window_s: float) -> float:
        """Put `level` in force and return the mean over the last `window_s`, in its unit.

        Worked example, 6 s: 1 for long, then 7 from t = 10. At 12 it is (4 x 1 + 2 x 7) / 6 = 3.
        """
        if self.at is None:
            self.at = now
            self.marks.append((now, 0.0))
        now = max(now, self.at)
        self.total += self.level * (now - self.at)
        self.at, self.level = now, level
        if now - self.marks[-1][0] >= window_s / MAX_MARKS:
            self.marks.append((now, self.total))
        begin = now - window_s
        while len(self.marks) > 1 and self.marks[1][0] <= begin:
            self.marks.popleft()
        return (self.total - self._total_at(begin)) / window_s if window_s > 0 else level

    def _total_at(self, when: float) -> float:
        """The integral up to `when`, between the two marks around it."""
        left, low = self.marks[0]
        right, high = self.marks[1] if len(self.marks) > 1 else (self.at or left, self.total)
        if when <= left or right <= left:
            return low
        return low + (high - low) * min(1.0, (when - left) / (right - left))


@dataclass(slots=True)
class Changes:
    """How much changed within a period, in one direction."""

    made: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=MAX_CHANGES))

    def add(self, at: float, amount: int) -> None:
        """Note a change by `amount`."""
        self.made.append((at, amount))

    def prune(self, now: float, longest_s: float) -> None:
        """Forget what is older than the longest period anyone asks for."""
        while self.made and self.made[0][0] <= now - longest_s:
            self.made.popleft()

    def within(self, now: float, period_s: float) -> int:
        """The sum of what changed later than `now - period_s`."""
        return sum(amount for at, amount in self.made if at > now - period_s)
