"""The front's protocol: any bytes, split anywhere, are answered once or handed over whole."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.router.call.errors import CallError
from runtime.router.call.request import Call
from runtime.router.callers.keys import Keys
from runtime.router.callers.memory import Memory
from runtime.router.front.connections import Front
from runtime.router.front.fast_path import PIPELINED_BYTES, PLAIN_BODY_BYTES

CHAT = b"/v1/chat/completions"
JSON = b"Content-Type: application/json\r\n"


class Transport(asyncio.Transport):
    """What a socket transport would have been told."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.reading = True
        self.protocol: object = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Successor(asyncio.Protocol):
    """aiohttp's protocol, as far as what it is given goes."""

    def __init__(self) -> None:
        self.got = b""

    def data_received(self, data: bytes) -> None:
        self.got += data


class Server:
    """aiohttp's server."""

    def __init__(self) -> None:
        self.connections: list[Successor] = []

    def __call__(self) -> Successor:
        self.connections.append(Successor())
        return self.connections[-1]


class Proxy:
    """Answers each call with its own body; `hold` keeps it waiting."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.cancelled = 0
        self.hold: asyncio.Event | None = None
        self.keys = Keys(anonymous=True)
        self.memory = Memory(2**30)
        self.metrics = self
        self.connections = 0
        self.error: Exception | None = None

    async def serve(self, call: Call, client) -> None:
        self.calls.append(call)
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        await client.begin(200, [(b"Content-Length", b"%d" % len(call.body))])
        await client.write(call.body)


class Bench:
    """One connection of a front."""

    def __init__(self, **options: object) -> None:
        self.proxy, self.server, self.transport = Proxy(), Server(), Transport()
        limits = {"read_s": 5.0, "max_connections": 10, "max_body_bytes": 2**20} | options
        self.front = Front(self.proxy, self.server, self.server, **limits)  # type: ignore[arg-type]
        self.connection: Any = self.front()
        self.transport.protocol = self.connection
        self.connection.connection_made(self.transport)

    def feed(self, data: bytes) -> None:
        if not self.transport.closed:
            self.transport.protocol.data_received(data)  # type: ignore[attr-defined]

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    @property
    def handed_over(self) -> bytes | None:
        return self.server.connections[0].got if self.server.connections else None


def plain(text: str = "x", extra: bytes = b"", path: bytes = CHAT) -> bytes:
    body = b'{"model":"m","x":"%b"}' % text.encode()
    head = b"POST %b HTTP/1.1\r\nHost: h\r\n%b%bContent-Length: %d\r\n\r\n"
    return head % (path, JSON, extra, len(body)) + body


TEXTS = st.lists(st.text(st.characters(codec="ascii", categories=("L", "N")), max_size=40),
                 min_size=1, max_size=5)  # fmt: skip
CUTS = st.lists(st.tuples(st.integers(0, 10_000), st.booleans()), max_size=12)


async def feed_in_pieces(bench: Bench, raw: bytes, cuts: list[tuple[int, bool]]) -> None:
    """Feed `raw`, cut at each place; where the flag says so, the loop runs before going on."""
    rest = {cut % (len(raw) + 1): wait for cut, wait in cuts}
    for start, stop in itertools.pairwise(sorted({0, len(raw), *rest})):
        bench.feed(raw[start:stop])
        if rest.get(stop):
            await bench.settle()
    await bench.settle()


@pytest.mark.parametrize("kind", [b"APPLICATION/json", b"application/json; charset=utf-8"])
async def test_json_however_it_is_written_is_plain(kind: bytes) -> None:
    bench = Bench()
    bench.feed(plain().replace(b"application/json", kind))
    await bench.settle()
    assert len(bench.proxy.calls) == 1


@given(texts=TEXTS, cuts=CUTS)
def test_every_request_is_served_here_or_handed_over_whole(
    texts: list[str], cuts: list[tuple[int, bool]]
) -> None:
    async def check() -> None:
        bench = Bench()
        await feed_in_pieces(bench, b"".join(map(plain, texts)), cuts)
        served = len(bench.proxy.calls)
        bodies = [plain(text).partition(b"\r\n\r\n")[2] for text in texts]
        assert [call.body for call in bench.proxy.calls] == bodies[:served]
        rest = b"".join(map(plain, texts[served:]))
        assert (bench.handed_over or b"") == rest
        answers = b"".join(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b)
            for b in bodies[:served]
        )
        assert bench.transport.written == answers

    asyncio.run(check())


ODD = [
    plain(extra=b"Transfer-Encoding: chunked\r\n"),
    b"POST %b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nT: t\r\n\r\n"
    % CHAT,
    plain(extra=b"Expect: 100-continue\r\n"),
    plain(extra=b"Connection: close\r\n"),
    plain(extra=b"Connection: keep-alive, X-Hop\r\n"),
    plain(extra=b"Content-Encoding: gzip\r\n"),
    plain().replace(JSON, b"Content-Type: multipart/form-data; boundary=b\r\n"),
    plain().replace(JSON, b"Content-Type: text/plain\r\n"),
    plain().replace(JSON, b"Content-Type: application/json ; charset=utf-8\r\n"),
    plain().replace(JSON, b"Content-Type: \xff\r\n"),
    plain().replace(JSON, b""),
    plain(extra=JSON),
    plain(extra=b"Content-Length: 3\r\n"),
    plain(extra=b"Upgrade: h2c\r\nConnection: upgrade\r\n"),
    plain(extra=b"X: " + b"x" * 20_000 + b"\r\n"),
    plain(extra=b"X: y\r\n" * 120),
    plain(extra=b"Host: other\r\n"),
    plain().replace(b"Host: h\r\n", b""),
    plain(path=CHAT + b"?a=b"),
    plain(path=b"/metrics"),
    plain().replace(b"POST", b"PUT"),
    plain().replace(b"HTTP/1.1", b"HTTP/1.0"),
    plain().replace(b'"model"', b'"modem"'),
    plain().replace(b'{"', b'["'),
    plain().replace(b"Content-Length: ", b"Content-Length: +"),
    plain().replace(b"Content-Length: ", b"Content-Length : "),
    b"POST %b HTTP/1.1\r\nHost: h\r\n%bContent-Length: %d\r\n\r\n"
    % (CHAT, JSON, PLAIN_BODY_BYTES + 1),
    b"POST %b HTTP/1.1\r\nHost: h\r\n%bContent-Length: 0\r\n\r\n" % (CHAT, JSON),
    b"POST %b HTTP/1.1\r\nHost: h\r\n X: folded\r\n\r\n" % CHAT,
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
]


@pytest.mark.parametrize("raw", ODD)
@settings(max_examples=20)
@given(cuts=CUTS)
def test_what_is_not_plain_goes_to_aiohttp_byte_for_byte(
    raw: bytes, cuts: list[tuple[int, bool]]
) -> None:
    async def check() -> None:
        bench = Bench()
        bench.feed(plain("first"))
        await bench.settle()
        answered = bench.transport.written
        await feed_in_pieces(bench, raw, cuts)
        assert bench.handed_over == raw
        assert bench.transport.written == answered
        assert len(bench.proxy.calls) == 1
        assert not bench.front.connections

    asyncio.run(check())


@settings(max_examples=300)
@given(head=st.sampled_from([b"", b"POST ", b"POST %b HTTP/1.1\r\n" % CHAT, plain()[:-3], plain()]),
       noise=st.binary(max_size=300), cuts=CUTS)  # fmt: skip
def test_noise_is_kept_or_handed_over_and_never_raises(
    head: bytes, noise: bytes, cuts: list[tuple[int, bool]]
) -> None:
    async def check() -> None:
        bench = Bench()
        await feed_in_pieces(bench, head + noise, cuts)
        if bench.handed_over is not None:
            assert (head + noise).endswith(bench.handed_over)
            assert (
                len(bench.handed_over) + len(bench.proxy.calls) * len(plain()) == len(head + noise)
                or bench.proxy.calls == []
            )

    asyncio.run(check())


async def test_an_early_end_cancels_the_call() -> None:
    bench = Bench()
    bench.proxy.hold = asyncio.Event()
    bench.feed(plain())
    await bench.settle()
    bench.connection.connection_lost(None)
    await bench.settle()
    assert bench.proxy.cancelled == 1
    assert not bench.front.connections


async def test_an_end_in_the_middle_of_a_request_is_no_call() -> None:
    bench = Bench()
    bench.feed(plain()[:-2])
    bench.connection.connection_lost(None)
    await bench.settle()
    assert not bench.proxy.calls
    assert bench.handed_over is None


async def test_what_is_pipelined_after_a_request_waits_and_is_bounded() -> None:
    bench = Bench()
    bench.proxy.hold = asyncio.Event()
    bench.feed(plain("1"))
    await bench.settle()
    bench.feed(plain("2") + plain("3")[:7])
    assert bench.transport.reading
    bench.feed(b"x" * PIPELINED_BYTES)
    assert not bench.transport.reading
    bench.proxy.hold.set()
    await bench.settle()
    assert bench.transport.reading
    assert len(bench.proxy.calls) == 1
    assert bench.handed_over == plain("2") + plain("3")[:7] + b"x" * PIPELINED_BYTES


@pytest.mark.parametrize(
    "error", [CallError(429, "queue_full", "full", retry_after_s=2.2), OSError()]
)
async def test_an_error_is_a_whole_answer_and_the_connection_goes_on(error: Exception) -> None:
    bench = Bench()
    bench.proxy.error = error
    bench.feed(plain(extra=b"X-Request-ID: mine\r\n"))
    await bench.settle()
    head, _, body = bench.transport.written.partition(b"\r\n\r\n")
    status = b"429 Too Many" if isinstance(error, CallError) else b"500 Internal"
    assert head.startswith(b"HTTP/1.1 " + status)
    assert b"X-Request-ID: mine" in head
    assert b"Content-Length: %d\r\n" % len(body) in head
    assert (b"Retry-After: 3" in head) == isinstance(error, CallError)
    bench.proxy.error = None
    bench.feed(plain())
    await bench.settle()
    assert bench.transport.written.count(b"HTTP/1.1 200 OK") == 1


async def test_one_connection_too_many_is_told_so() -> None:
    bench = Bench(max_connections=1)
    bench.proxy.hold = asyncio.Event()
    bench.feed(plain())
    await bench.settle()
    late, transport = bench.front(), Transport()
    late.connection_made(transport)
    assert transport.closed
    assert transport.written.startswith(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close")
    assert b"Retry-After: 1" in transport.written
    late.connection_lost(None)
    bench.proxy.hold.set()
    await bench.settle()
    again, free = bench.front(), Transport()
    bench.connection.connection_lost(None)
    again.connection_made(free)
    assert not free.closed


async def test_idle_and_slow_connections_are_closed_and_busy_ones_are_not() -> None:
    bench = Bench(read_s=5.0)
    now = bench.front.loop.time()
    bench.connection.close_if_late(now + 4, 5.0)
    assert not bench.transport.closed
    silent: Any = bench.front()
    closed = Transport()
    silent.connection_made(closed)
    silent.close_if_late(now + 6, 5.0)
    assert closed.closed, "its first request never came"
    bench.proxy.hold = asyncio.Event()
    bench.feed(plain())
    await bench.settle()
    bench.connection.close_if_late(now + 1000, 5.0)
    assert not bench.transport.closed
    bench.proxy.hold.set()
    await bench.settle()
    bench.connection.close_if_late(now + 60, 5.0)
    assert not bench.transport.closed
    bench.feed(plain()[:10])
    bench.connection.close_if_late(now + 4, 5.0)
    assert not bench.transport.closed
    bench.connection.close_if_late(now + 6, 5.0)
    assert bench.transport.closed


async def test_a_caller_who_does_not_read_holds_up_the_call_and_then_loses_it() -> None:
    bench = Bench()
    bench.connection.pause_writing()
    bench.feed(plain())
    await bench.settle()
    assert len(bench.proxy.calls) == 1
    bench.feed(plain())
    await bench.settle()
    assert len(bench.proxy.calls) == 1, "the next call began before the last answer was taken"
    now = bench.front.loop.time()
    bench.connection.close_if_late(now + 4, 5.0)
    assert not bench.transport.closed
    bench.connection.resume_writing()
    await bench.settle()
    assert len(bench.proxy.calls) == 2
    bench.connection.pause_writing()
    bench.connection.close_if_late(now + 6, 5.0)
    assert bench.transport.closed


async def test_draining_closes_the_idle_and_waits_for_the_rest() -> None:
    bench = Bench()
    bench.proxy.hold = asyncio.Event()
    idle, transport = bench.front(), Transport()
    idle.connection_made(transport)
    bench.feed(plain())
    await bench.settle()
    drain = asyncio.ensure_future(bench.front.drain(5.0))
    await bench.settle()
    assert (transport.closed, bench.transport.closed, drain.done()) == (True, False, False)
    bench.proxy.hold.set()
    await bench.settle()
    assert bench.transport.closed
    for connection in (idle, bench.connection):
        connection.connection_lost(None)
    await drain
