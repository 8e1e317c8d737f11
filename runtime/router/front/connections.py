"""All client connections of one router: counted, limited, swept and drained.

A connection begins as a `PlainConnection` (`fast_path.py`) and may be handed over to aiohttp's
server.

Rule this file keeps: no timer per connection: one sweep a second looks at all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from runtime.router.call.errors import CallError
from runtime.router.call.request_ids import RequestIds
from runtime.router.call.whole_error import error_answer
from runtime.router.front.aiohttp_server import OddConnection
from runtime.router.front.fast_path import PLAIN_BODY_BYTES, PlainConnection
from runtime.router.proxy.serving import Proxy

SWEEP_S = 1.0
LOOK_S = 0.02  # between two looks at who has just connected


def _full() -> bytes:
    message = "this router has as many connections as it may (router.max_connections)"
    error = CallError(503, "too_many_connections", message, retry_after_s=1.0)
    return error_answer(error, "", "-").replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


_FULL = _full()


class Front:
    """What all connections share; `server` is aiohttp's.

    `read_s`: how long a request may take to arrive, and a caller to read any of its answer.
    Beyond `max_connections` (known to a second where they were handed over) the one that has been
    silent longest is closed, first those that never asked for anything; if all are busy, the new
    one gets a 503. `odd` makes who takes over.
    """

    def __init__(
        self,
        proxy: Proxy,
        server: web.Server,
        odd: Callable[[], web.RequestHandler],
        *,
        read_s: float,
        max_connections: int,
        max_body_bytes: int,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.proxy = proxy
        self.memory = proxy.memory
        self.server = server
        self._odd = odd
        # Who may be closed for others, the first to go last; None: not looked for since the sweep.
        self._silent: list[PlainConnection | OddConnection] | None = None
        self.max_body_bytes = min(PLAIN_BODY_BYTES, max_body_bytes)
        self.request_id = RequestIds()
        self.connections: set[PlainConnection] = set()
        self.draining = False
        self._read_s = read_s
        self._max_connections = max_connections
        self._handed_over = 0  # connections of aiohttp's server, as the last sweep saw it
        self._idle = asyncio.Event()
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)

    def __call__(self) -> asyncio.Protocol:
        """A protocol for a new connection."""
        return PlainConnection(self)

    def opened(self, connection: PlainConnection) -> None:
        """Count it; one too many is turned away."""
        self.connections.add(connection)
        count = len(self.connections) + self._handed_over
        self.proxy.metrics.connections = count
        if count > self._max_connections and not self._make_room(connection):
            connection.turn_away(_FULL)

    def _make_room(self, new: PlainConnection) -> bool:
        """Whether a connection that only waits was closed; looked for once a sweep."""
        if self._silent is None:
            now = self.loop.time()
            plain = [c for c in self.connections if c is not new and c.waits_since is not None]
            plain.sort(key=lambda c: (not c.served, now - (c.waits_since or now)))
            odd = [c for c in self.server.connections if isinstance(c, OddConnection) and c.idle]
            self._silent = [*odd, *plain]
        while self._silent:
            found = self._silent.pop()
            if isinstance(found, OddConnection) and found.idle:
                found.force_close()
                self._handed_over -= 1
                return True
            if isinstance(found, PlainConnection) and found.waits_since is not None:
                found.abort()
                return True
        return False

    def hand_over(self, connection: PlainConnection) -> web.RequestHandler:
        """Who serves it from now on."""
        self.forget(connection)
        self._handed_over += 1
        return self._odd()

    def forget(self, connection: PlainConnection) -> None:
        """Drop a connection that is served elsewhere, or closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._idle.set()

    async def hear_new(self, within_s: float) -> None:
        """Let who has just connected ask, before `drain`: a first request may be under way."""
        self.draining = True
        until = self.loop.time() + within_s
        # An event would cost every call; this is once, at the end.
        while self.loop.time() < until and any(not c.served for c in self.connections):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)

    async def drain(self, timeout_s: float) -> None:
        """End idle connections now, the others with their answer, or after `timeout_s`."""
        self.draining = True
        self._timer.cancel()
        for connection in list(self.connections):
            connection.close_if_idle()
        self._idle.clear()
        if self.connections:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                for connection in list(self.connections):
                    connection.abort()

    def _sweep(self) -> None:
        now = self.loop.time()
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)
        self._handed_over = len(self.server.connections)
        self._silent = None
        self.proxy.metrics.connections = len(self.connections) + self._handed_over
        for connection in list(self.connections):
            connection.close_if_late(now, self._read_s)
        for handed_over in self.server.connections:
            if isinstance(handed_over, OddConnection):
                handed_over.close_if_late(now, self._read_s)
