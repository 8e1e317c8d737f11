"""The engine of the router's benchmark: the least HTTP server that can answer, so that what is
measured is the proxy in front of it. `python http_origin.py` prints its port.

A request whose body has `"stream":true` gets 64 chunked events of about 180 bytes, back to back, or
5 ms apart if it has `"paced":true` too; any other gets a JSON answer of about 400 bytes.
"""

from __future__ import annotations

import asyncio

import uvloop

CHUNKS = 64
PACE_S = 0.005
_BODY = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[{"text":"%b"}]}' % (b"x" * 320)
_UNARY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)
_EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"y" * 130)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_END = b"0\r\n\r\n"
_STREAM = _HEAD + CHUNKS * _CHUNK + _END


class Origin(asyncio.Protocol):
    """One connection; requests come one after the other, each with a Content-Length."""

    def __init__(self) -> None:
        self._buffer = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            stop = end + 4 + length
            if len(self._buffer) < stop:
                return
            body, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            if b'"paced":true' in body:
                self._transport.write(_HEAD)
                self._pace(CHUNKS)
            elif b'"stream":true' in body:
                self._transport.write(_STREAM)
            else:
                self._transport.write(_UNARY)

    def _pace(self, left: int) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(_CHUNK if left else _END)
        if left:
            self._loop.call_later(PACE_S, self._pace, left - 1)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Origin, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
