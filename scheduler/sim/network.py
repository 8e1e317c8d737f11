"""Messages on their way: they take time, and under faults are lost, doubled or overtaken. Pure.

Rules this file keeps: a message whose sender waits for an answer ends either in its delivery or in
the sender's word that it is lost, as an HTTP call does; never in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.sim.loop import Action, Loop

DELAY_S = 0.001  # one way in one data centre, the HTTP server's work included (an assumption)
LOST_S = 1.0  # when a sender gives a lost message up (a connection reset or a short timeout)


@dataclass(frozen=True, slots=True)
class Weather:
    """How messages fare. Shares are of all messages, seconds the most that is added."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    late_s: float = 3.0


FAIR = Weather()


class Network:
    """`weather` may change at any time."""

    def __init__(self, loop: Loop, draw: Callable[[], float]) -> None:
        """`draw` gives numbers from 0 up to 1, of a seeded generator."""
        self.weather = FAIR
        self.sent = 0
        self._loop = loop
        self._draw = draw

    def send(self, lost: Callable[[], object], action: Action, *args: object) -> None:
        """Call `action(*args)` at the other end, or `lost()` here."""
        self.sent += 1
        weather = self.weather
        if weather is FAIR:
            self._loop.after(DELAY_S, action, *args)
            return
        draw = self._draw
        if draw() < weather.lost:
            self._loop.after(LOST_S, lost)
            return
        self._loop.after(self._delay_s(weather), action, *args)
        if draw() < weather.doubled:
            self._loop.after(self._delay_s(weather), action, *args)

    def _delay_s(self, weather: Weather) -> float:
        draw = self._draw
        late_s = draw() * weather.late_s if draw() < weather.late else 0.0
        return DELAY_S * (0.5 + draw()) + late_s
