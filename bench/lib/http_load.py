"""A closed-loop HTTP load: `python http_load.py PORT CONNECTIONS SECONDS unary|stream|paced`.

Raw protocols on uvloop, so that the load takes as little of the host as it can. Prints one JSON
object: requests, errors, seconds, and of the time to a whole answer, or of a stream to its first
event, p50_ms and p99_ms.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop

_HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    "Accept: */*\r\nUser-Agent: bench\r\nAuthorization: Bearer client\r\nContent-Length: {}\r\n\r\n"
)


def request(kind: str) -> bytes:
    """A chat request of about 500 bytes."""
    flags = {"unary": "", "stream": ',"stream":true', "paced": ',"stream":true,"paced":true'}[kind]
    text = "z" * 260
    body = f'{{"model":"bench","messages":[{{"role":"user","content":"{text}"}}]{flags}}}'
    return (_HEAD.format(len(body)) + body).encode()


class Client(asyncio.Protocol):
    """One connection: the next request goes out when the last answer is whole."""

    def __init__(self, kind: str, until: float, latencies: list[float]) -> None:
        self._request = request(kind)
        self._stream = kind != "unary"
        self._first_at: float | None = None
        self._until = until
        self._latencies = latencies
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._buffer = b""
        self._first_at = None
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._first_at is None and b"data: " in self._buffer:
            self._first_at = time.perf_counter()
        if not self._is_whole():
            return
        now = time.perf_counter()
        self._latencies.append((self._first_at or now) - self._sent_at)
        self.errors += not self._is_right()
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None or time.perf_counter() < self._until:
            self.errors += 1
        if not self.done.done():
            self.done.set_result(None)

    def _is_whole(self) -> bool:
        if self._stream:
            return self._buffer.endswith(b"\r\n0\r\n\r\n")
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._buffer[:end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        return len(self._buffer) >= end + 4 + length

    def _is_right(self) -> bool:
        if not self._buffer.startswith(b"HTTP/1.1 200 "):
            return False
        return not self._stream or self._buffer.count(b"data: ") == 64


async def main() -> None:
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    kind = sys.argv[4]
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    start = time.perf_counter()
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: Client(kind, start + seconds, latencies), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    took = time.perf_counter() - start
    latencies.sort()
    print(
        json.dumps(
            {
                "requests": len(latencies),
                "errors": sum(client.errors for client in clients),
                "seconds": took,
                "p50_ms": 1000 * latencies[len(latencies) // 2],
                "p99_ms": 1000 * latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)],
            }
        )
    )


if __name__ == "__main__":
    uvloop.run(main())
