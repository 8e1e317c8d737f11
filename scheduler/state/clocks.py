"""Another process's steady clock, read through the messages that it sends. Pure.

A message made at `sent_s` by the sender's clock is heard some time later. The least delay ever seen
tells the distance of the two clocks, so a message that comes late is known to be late: two uses
100 ms apart keep their order though one was told of half a second after the other.

Rules this file keeps: what is worked out is never later than when the message was heard.
"""

from __future__ import annotations

DRIFT = 2e-4  # two hosts' quartz clocks part by less than this (200 ppm)
TOO_LATE_S = 10.0  # no message is under way for so long: that clock stood still or was set again


class RemoteClock:
    """Of one run of one process."""

    __slots__ = ("_heard_at", "_offset_s")

    def __init__(self) -> None:
        self._offset_s: float | None = None  # ours less theirs, by the least delayed message
        self._heard_at = 0.0

    def made_at(self, sent_s: float | None, now: float) -> float:
        """When a message that is heard now was made, by our clock; now where it does not say.

        Worked example: messages made at 10 and 11 are heard at 110.01 and 111.6. The first tells an
        offset of at most 100.01, so the second was made at 111.01 and not at 111.6.
        """
        if sent_s is None:
            return now
        seen = now - sent_s
        known = self._offset_s
        if known is not None:
            known += DRIFT * max(0.0, now - self._heard_at)
        if known is None or seen <= known or seen > known + TOO_LATE_S:
            known = seen
        self._offset_s, self._heard_at = known, now
        return sent_s + known
