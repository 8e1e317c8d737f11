"""A closed-loop HTTP load: `python http_load.py PORT CONNECTIONS SECONDS unary|stream|paced|slow
[KEY]`.

Raw protocols on uvloop, so that the load takes as little of the host as it can. Prints one JSON
object: requests, errors, seconds, and p50_ms and p99_ms of the time to a whole answer, or of a
stream to its first event. `slow` is one stream a connection, begun spread over a tenth of a second,
and its p50_ms and p99_ms are of the gaps between two events.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from typing import cast

import uvloop

# What every proxy is asked with: it has the form of a key of ours, LiteLLM takes it as its own.
KEY = "sk-stoker-benchbench-" + "b" * 43
SCARCE_KEY = "sk-stoker-scarcescar-" + "s" * 43  # of ours: ten calls a minute
_HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Accept: */*\r\nUser-Agent: bench\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n"
    "\r\n"
)
_FLAGS = {
    "unary": "",
    "stream": ',"stream":true',
    "paced": ',"stream":true,"paced":true',
    "slow": ',"stream":true,"slow":true',
}
_EVENTS = {"stream": 64, "paced": 64, "slow": 50}


def request(kind: str, key: str = KEY) -> bytes:
    """A chat request of about 500 bytes."""
    text = "z" * 260
    body = f'{{"model":"bench","messages":[{{"role":"user","content":"{text}"}}]{_FLAGS[kind]}}}'
    return (_HEAD.format(key, len(body)) + body).encode()


class Client(asyncio.Protocol):
    """One connection: the next request goes out when the last answer is whole."""

    def __init__(
        self, kind: str, key: str, until: float, times: list[float], begin_after_s: float
    ) -> None:
        self._request = request(kind, key)
        self._kind = kind
        self._events = _EVENTS.get(kind, 0)
        self._until = until
        self._times = times
        self._begin_after_s = begin_after_s
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests = 0
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        asyncio.get_running_loop().call_later(self._begin_after_s, self._send)

    def _send(self) -> None:
        self._buffer = b""
        self._seen = 0
        self._seen_at = self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        now = time.perf_counter()
        if self._events:
            self._note_events(data, now)
        if not self._is_whole():
            return
        self.requests += 1
        if not self._events:
            self._times.append(now - self._sent_at)
        self.errors += not self._is_right()
        if now < self._until and self._kind != "slow":
            self._send()
        else:
            self._until = 0.0
            self._transport.close()

    def _note_events(self, data: bytes, now: float) -> None:
        count = self._buffer.count(b"data: ") if self._seen == 0 else data.count(b"data: ")
        if count and (self._kind == "slow") == bool(self._seen):
            self._times.append(now - self._seen_at)
        if count:
            self._seen_at = now
        self._seen += count

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None or time.perf_counter() < self._until:
            self.errors += 1
        if not self.done.done():
            self.done.set_result(None)

    def _is_whole(self) -> bool:
        if self._events:
            return self._buffer.endswith(b"\r\n0\r\n\r\n")
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        _, found, length = self._buffer[:end].lower().partition(b"content-length:")
        if not found:
            return self._buffer.endswith(b"\r\n0\r\n\r\n")
        return len(self._buffer) >= end + 4 + int(length.split(b"\r\n", 1)[0])

    def _is_right(self) -> bool:
        if not self._buffer.startswith(b"HTTP/1.1 200 "):
            return False
        return not self._events or self._buffer.count(b"data: ") == self._events


async def load(
    port: int, connections: int, seconds: float, kind: str, key: str = KEY
) -> dict[str, float]:
    """Load what listens on `port`; what is printed."""
    loop = asyncio.get_running_loop()
    times: list[float] = []
    start = time.perf_counter()
    clients = []
    for index in range(connections):
        begin_after_s = 0.1 * index / connections if kind == "slow" else 0.0
        make = partial(Client, kind, key, start + seconds, times, begin_after_s)
        _, client = await loop.create_connection(make, "127.0.0.1", port)
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    took = time.perf_counter() - start
    times.sort()
    return {
        "requests": sum(client.requests for client in clients),
        "errors": sum(client.errors for client in clients),
        "seconds": took,
        "p50_ms": 1000 * times[len(times) // 2],
        "p99_ms": 1000 * times[min(len(times) - 1, len(times) * 99 // 100)],
    }


if __name__ == "__main__":
    _port, _connections, _seconds, _kind = sys.argv[1:5]
    _key = sys.argv[5] if len(sys.argv) > 5 else KEY
    _work = load(int(_port), int(_connections), float(_seconds), _kind, _key)
    print(json.dumps(uvloop.run(_work)))
