"""What became of one call: filled in as it goes, then told to who counts, logs, traces, charges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from runtime.router.call.request import Call
from runtime.router.call.token_meter import NOTHING, Meter, TokenUsage
from runtime.wire.routes import Endpoint, ModelRoute

HUNG_UP = 499  # the caller did not wait for its answer
BROKEN_OFF = "broken_off"  # the error of an answer that ended in its middle
NAME_CHARS = 256  # kept of the name of a model that does not exist


class Trace(Protocol):
    """Who is told of each step of one call (`observe/tracing.py`)."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""

    def hold(self, reason: str | None) -> None:
        """Note that it waits for a replica from now on, and why, where that is known."""

    def let_go(self) -> None:
        """Note that it waits no more."""

    def sent(self, lines: list[bytes], endpoint: Endpoint) -> list[bytes]:
        """Note that it goes to a replica; the header lines to send for `lines`."""

    def failed(self, reason: str) -> None:
        """Note that the replica gave no answer."""

    def end(self) -> None:
        """Note that the call is over."""


class Outcome:
    """Times are in seconds from the call's arrival, which was at `began_at` of the loop's clock.

    `model` is the route's name ("": no such model), `rung` how warm it was when the call arrived.
    `held_s` is what it waited for a replica, `ttft_s` when the first byte of a body came (None:
    none did), `error` says in a word why it did not go well. `usage` is there at the end.
    """

    __slots__ = (
        "began_at", "cached", "call", "error", "held_s", "meter", "model", "replica_id", "rung",
        "status", "total_s", "trace", "ttft_s", "usage",
    )  # fmt: skip

    def __init__(self, call: Call, route: ModelRoute | None, now: float) -> None:
        self.call = call
        self.began_at = now
        self.model = route.name if route else ""
        self.rung = route.warmth if route else ""
        self.status = HUNG_UP
        self.replica_id = ""
        self.cached = False  # answered from the cache
        self.held_s = 0.0
        self.ttft_s: float | None = None
        self.total_s = 0.0
        self.error = ""
        self.meter: Meter | None = None  # of the answer of the replica tried last
        self.usage: TokenUsage = NOTHING
        self.trace: Trace | None = None

    def end(self, now: float) -> None:
        """No more will come."""
        self.total_s = now - self.began_at
        if self.status == HUNG_UP:
            self.error = "hung_up"
        if self.meter is not None:
            self.usage = self.meter.usage(self.call.path)

    @property
    def size_bytes(self) -> int:
        """Of the body that the engine sent."""
        return self.meter.size if self.meter is not None else 0


Observer = Callable[[Outcome], None]


class Tracer(Protocol):
    """Who makes the trace of each call."""

    def begin(self, outcome: Outcome) -> Trace:
        """The trace of a call that has just arrived."""
