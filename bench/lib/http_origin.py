"""The engine of the router's benchmark: the least HTTP server that can answer, so that what is
measured is the proxy in front of it. `python http_origin.py [SLOTS SERVICE_S]` prints its port.

A request whose body has `"stream":true` gets 64 chunked events of about 180 bytes, back to back;
5 ms apart if it has `"paced":true` too; 50 of them 100 ms apart if it has `"slow":true`. Any other
gets a JSON answer of about 400 bytes. A stream whose body asks for usage tells it in one more
event, as vLLM does: a proxy that asks has it to take out again. With SLOTS, at most so many are
answered at a time, each after SERVICE_S seconds; the others wait, as in an engine's own queue.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import cast

import uvloop

CHUNKS = 64
PACE_S = 0.005
SLOW_CHUNKS = 50
SLOW_S = 0.1
_BODY = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"bench","choices":[{"index":'
    b'0,"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}],"usage":'
    b'{"prompt_tokens":9,"completion_tokens":9,"total_tokens":18}}' % (b"x" * 180)
)
_UNARY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)
_EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"y" * 130)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[],"usage":{"prompt_tokens":9,"total_tokens":73,"completion_tokens":64}}\n\n'
)
_END = b"0\r\n\r\n"
_ENDS = {False: _END, True: b"%x\r\n%b\r\n" % (len(_USAGE), _USAGE) + _END}
_STREAMS = {asked: _HEAD + CHUNKS * _CHUNK + end for asked, end in _ENDS.items()}


class Slots:
    """What limits an engine's capacity."""

    def __init__(self, slots: int, service_s: float) -> None:
        self._free = slots
        self._service_s = service_s
        self._waiting: deque[asyncio.Transport] = deque()
        self._loop = asyncio.get_running_loop()

    def answer(self, transport: asyncio.Transport) -> None:
        if self._free:
            self._free -= 1
            self._loop.call_later(self._service_s, self._done, transport)
        else:
            self._waiting.append(transport)

    def _done(self, transport: asyncio.Transport) -> None:
        if not transport.is_closing():
            transport.write(_UNARY)
        self._free += 1
        while self._waiting:
            following = self._waiting.popleft()
            if not following.is_closing():
                self.answer(following)
                break


class Origin(asyncio.Protocol):
    """One connection; requests come one after the other, each with a Content-Length or no body."""

    def __init__(self, slots: Slots | None) -> None:
        self._buffer = b""
        self._slots = slots
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            _, _, length = head.partition(b"content-length:")
            stop = end + 4 + int(length.split(b"\r\n", 1)[0] or 0)
            if len(self._buffer) < stop:
                return
            body, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        asked = b'"include_usage":true' in body
        if b'"stream":true' not in body:
            if self._slots is not None and body:
                self._slots.answer(self._transport)
            else:
                self._transport.write(_UNARY)
        elif b'"paced":true' in body:
            self._transport.write(_HEAD)
            self._pace(CHUNKS, PACE_S, _ENDS[asked])
        elif b'"slow":true' in body:
            self._transport.write(_HEAD)
            self._pace(SLOW_CHUNKS, SLOW_S, _ENDS[asked])
        else:
            self._transport.write(_STREAMS[asked])

    def _pace(self, left: int, pace_s: float, end: bytes) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(_CHUNK if left else end)
        if left:
            self._loop.call_later(pace_s, self._pace, left - 1, pace_s, end)


async def main() -> None:
    slots = Slots(int(sys.argv[1]), float(sys.argv[2])) if len(sys.argv) > 2 else None
    server = await asyncio.get_running_loop().create_server(
        lambda: Origin(slots), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
