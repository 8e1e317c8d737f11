"""Percentiles of the last minute's durations (60 to 70 s) in a fixed few kilobytes. Pure.

Rule this file keeps: an answer is at most 10 % above the true value, and never below it, for
durations from 1 ms to 1,000 s (the buckets' bounds grow by 10 %).
"""

from __future__ import annotations

import math

_GROWTH = 1.1
_FIRST_S = 0.001
_BUCKETS = 146  # 0.001 * 1.1 ** 145 is just above 1,000 s
_LOG_GROWTH = math.log(_GROWTH)
SLICE_S = 10.0
SLICES = 6


class SlidingPercentiles:
    """Counts by duration in six slices of ten seconds, the oldest given up as time goes on."""

    __slots__ = ("_counts", "_slices", "_until")

    def __init__(self) -> None:
        self._slices: list[list[int]] = []  # newest first
        self._counts: list[int] = []
        self._until = -math.inf

    def add(self, seconds: float, now: float) -> None:
        """One more duration, ended at `now`."""
        if now >= self._until:
            self._turn(now)
        index = 0 if seconds <= _FIRST_S else math.ceil(math.log(seconds / _FIRST_S) / _LOG_GROWTH)
        self._counts[min(index, _BUCKETS - 1)] += 1

    def quantile(self, share: float, now: float) -> float | None:
        """The duration that `share` (0 to 1) of the last minute's were at most; None: none.

        Example: of 0.010 s nine times and 1.0 s once, quantile(0.95) is 1.0 s (up to 10 % more).
        """
        if now >= self._until:
            self._turn(now)
        total = sum(map(sum, self._slices))
        if not total:
            return None
        left = math.ceil(share * total)
        for index in range(_BUCKETS):
            left -= sum(counts[index] for counts in self._slices)
            if left <= 0:
                return _FIRST_S * _GROWTH**index
        return _FIRST_S * _GROWTH ** (_BUCKETS - 1)

    def _turn(self, now: float) -> None:
        """Begin a slice; those that ended more than a minute ago go."""
        missed = 0 if self._until == -math.inf else int((now - self._until) // SLICE_S)
        empty = [[0] * _BUCKETS for _ in range(min(missed, SLICES))]
        self._counts = [0] * _BUCKETS
        self._slices = [self._counts, *empty, *self._slices][:SLICES]
        self._until = now + SLICE_S
