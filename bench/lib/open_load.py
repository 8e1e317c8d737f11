"""An open-loop load: `python open_load.py PORT RATE SECONDS` sends RATE requests a second, come
what may, each on a connection that is free or a new one. Prints one JSON object: by status how
many, the p99 time in ms of those answered 200 and of the others, and how many of those refused
with 429 or 503 had no Retry-After.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import cast

import uvloop
from http_load import request

_SETTLE_S = 20.0


class Caller(asyncio.Protocol):
    """One connection, used again and again."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._sent_at: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, data: bytes) -> None:
        self._buffer = b""
        self._sent_at = time.perf_counter()
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._sent_at is None:
            return
        head = self._buffer[:end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + length:
            return
        took, self._sent_at = time.perf_counter() - self._sent_at, None
        self._load.ended(int(head.split()[1]), took, b"\r\nretry-after:" in head)
        self._load.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent_at is not None:
            self._load.ended(0, 0.0, False)
        if self in self._load.free:
            self._load.free.remove(self)


class Load:
    """Arrivals by the clock, and what became of them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._request = request("unary")
        self.free: list[Caller] = []
        self.statuses: Counter[int] = Counter()
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.no_retry_after = 0
        self.sent = 0

    def ended(self, status: int, seconds: float, retry_after: bool) -> None:
        self.statuses[status] += 1
        if status:
            self.times[status == 200].append(seconds)
        self.no_retry_after += status in (429, 503) and not retry_after

    async def one(self) -> None:
        self.sent += 1
        if not self.free:
            _, caller = await asyncio.get_running_loop().create_connection(
                lambda: Caller(self), "127.0.0.1", self._port
            )
        else:
            caller = self.free.pop()
        caller.send(self._request)

    async def run(self, rate: float, seconds: float) -> None:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            while (now := time.perf_counter() - start) < seconds:
                while self.sent < now * rate:
                    tasks.create_task(self.one())
                    await asyncio.sleep(0)
                await asyncio.sleep(0.002)
        deadline = time.perf_counter() + _SETTLE_S
        while self.statuses.total() < self.sent and time.perf_counter() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def p99_ms(seconds: list[float]) -> float:
    seconds.sort()
    return 1000 * seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)] if seconds else 0.0


async def main() -> None:
    port, rate, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    load = Load(port)
    await load.run(rate, seconds)
    print(
        json.dumps(
            {
                "sent": load.sent, "statuses": load.statuses,
                "unanswered": load.sent - load.statuses.total(),
                "ok_p99_ms": p99_ms(load.times[True]), "refused_p99_ms": p99_ms(load.times[False]),
                "no_retry_after": load.no_retry_after,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    uvloop.run(main())
