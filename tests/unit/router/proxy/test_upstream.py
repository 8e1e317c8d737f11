"""The engine connection: any bytes, split anywhere, give the right answer or an error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.router.proxy.upstream import (
    BUFFER_BYTES,
    EngineTimeouts,
    Reply,
    Upstream,
    UpstreamError,
    _Connection,
    _too_late,
)


class Socket:
    family = socket.AF_INET

    def setsockopt(self, *option: int) -> None:
        pass


class Transport(asyncio.Transport):
    """What a socket transport would have been told."""

    def __init__(self) -> None:
        super().__init__({"socket": Socket()})
        self.written = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


async def exchange(raw: bytes, cuts: list[int], end: bool) -> tuple[Reply, bytes | str, bool]:
    """Feed `raw` in pieces to one request's connection; its body or the reason it has none, and
    whether the connection went back to the pool."""
    idle: deque[_Connection] = deque()
    connection, transport = _Connection("", idle, set()), Transport()
    connection.connection_made(transport)
    reply = connection.send(b"POST / HTTP/1.1\r\n\r\n", b"", 0.0)
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    for start, stop in itertools.pairwise(edges):
        if not transport.closed:
            connection.data_received(raw[start:stop])
    pooled = bool(idle) and not transport.closed
    if end or transport.closed:
        connection.connection_lost(None)
    body: Any = b""  # the bytes, or why there are none
    try:
        async with asyncio.timeout(5):
            await reply.head()
            while data := await reply.read():
                body += data
    except UpstreamError as error:
        body = error.reason
    return reply, body, pooled


CUTS = st.lists(st.integers(0, 10_000), max_size=12)
PIECES = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


@given(pieces=PIECES, cuts=CUTS, interim=st.booleans(), trailer=st.booleans())
def test_chunked_answers(
    pieces: list[bytes], cuts: list[int], interim: bool, trailer: bool
) -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\n" * interim
    raw += b"HTTP/1.1 207 X\r\nA: 1\r\nTransfer-Encoding: chunked\r\nA: 2\r\n\r\n"
    raw += b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    raw += b"0\r\n" + b"T: t\r\n" * trailer + b"\r\n"
    reply, body, pooled = asyncio.run(exchange(raw, cuts, end=False))
    assert (reply.status, body, pooled) == (207, b"".join(pieces), True)
    assert [v for n, v in reply.headers if n == b"A"] == [b"1", b"2"]


@given(body=st.binary(max_size=2000), cuts=CUTS)
def test_answers_with_a_length(body: bytes, cuts: list[int]) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    _, got, pooled = asyncio.run(exchange(raw, cuts, end=False))
    assert (got, pooled) == (body, True)


@given(body=st.binary(max_size=2000), cuts=CUTS)
def test_answers_until_the_end_are_not_pooled(body: bytes, cuts: list[int]) -> None:
    _, got, pooled = asyncio.run(exchange(b"HTTP/1.1 200 OK\r\n\r\n" + body, cuts, end=True))
    assert (got, pooled) == (body, False)


@given(pieces=PIECES, cuts=CUTS, data=st.data(), framed=st.booleans())
def test_a_framed_answer_cut_short_is_always_an_error(
    pieces: list[bytes], cuts: list[int], data: st.DataObject, framed: bool
) -> None:
    body = b"".join(pieces)
    if framed:
        raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    else:
        raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw += b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    _, got, pooled = asyncio.run(exchange(cut, cuts, end=True))
    assert isinstance(got, str)
    assert not pooled


@settings(max_examples=300)
@given(head=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]),
       noise=st.binary(max_size=200), cuts=CUTS)  # fmt: skip
def test_noise_never_raises_anything_else(head: bytes, noise: bytes, cuts: list[int]) -> None:
    asyncio.run(exchange(head + noise, cuts, end=True))


EXTRA = st.sampled_from([b"H", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])


@given(extra=EXTRA | st.binary(min_size=1).filter(lambda b: b[0] not in b"\r\n"), cuts=CUTS)
def test_a_connection_with_more_after_its_answer_is_not_reused(
    extra: bytes, cuts: list[int]
) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    _, got, pooled = asyncio.run(exchange(raw + extra, cuts, end=True))
    assert got == b"ok"
    assert not pooled


def test_an_unread_answer_stops_the_socket_and_reading_resumes_it() -> None:
    async def check() -> None:
        connection, transport = _Connection("", deque(), set()), Transport()
        connection.connection_made(transport)
        reply = connection.send(b"", b"", 0.0)
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n")
        connection.data_received(b"x" * BUFFER_BYTES)
        assert not transport.paused
        connection.data_received(b"x")
        assert transport.paused
        assert len(await reply.read()) == BUFFER_BYTES + 1
        assert not transport.paused
        reply.close()
        assert transport.closed

    asyncio.run(check())


class Sink:
    """Takes a body as it comes."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def feed(self, data: bytes) -> None:
        self.got.append(data)


@given(pieces=PIECES, cuts=CUTS, piped_from=st.integers(0, 12), cut_short=st.booleans())
def test_a_piped_body_is_the_same_however_it_comes(
    pieces: list[bytes], cuts: list[int], piped_from: int, cut_short: bool
) -> None:
    """`pipe` may begin at any moment; an answer cut short is an error after all that came."""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    raw = raw[:-1] if cut_short else raw

    async def check() -> None:
        connection, transport, sink = _Connection("", deque(), set()), Transport(), Sink()
        connection.connection_made(transport)
        reply = connection.send(b"", b"", 0.0)
        edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
        pipe: asyncio.Future[None] | None = None
        for index, (start, stop) in enumerate(itertools.pairwise(edges)):
            if index >= piped_from and pipe is None:
                pipe = asyncio.ensure_future(reply.pipe(sink))
                await asyncio.sleep(0)
            connection.data_received(raw[start:stop])
        connection.connection_lost(None)
        try:
            async with asyncio.timeout(5):
                await (pipe or reply.pipe(sink))
        except UpstreamError:
            assert cut_short
        else:
            assert not cut_short
        assert b"".join(sink.got) == b"".join(pieces)

    asyncio.run(check())


def test_each_time_limit_says_which_it_is() -> None:
    async def check() -> None:
        limits = EngineTimeouts(first_byte_s=1.0, idle_s=2.0, total_s=10.0)
        connection, transport = _Connection("", deque(), set()), Transport()
        connection.connection_made(transport)
        reply = connection.send(b"", b"", 100.0)
        assert _too_late(reply, 100.9, limits) is None
        late = _too_late(reply, 101.1, limits)
        assert late is not None
        assert late.limit == "first_byte_timeout"
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\nx")
        assert _too_late(reply, 101.1, limits) is None
        assert _too_late(reply, 103.0, limits) is None
        late = _too_late(reply, 103.2, limits)
        assert late is not None
        assert late.limit == "idle_timeout"
        reply.pause()  # a client that does not read is not the engine's fault
        assert _too_late(reply, 109.9, limits) is None
        late = _too_late(reply, 110.1, limits)
        assert late is not None
        assert late.limit == "total_timeout"

    asyncio.run(check())


LIMITS = EngineTimeouts(connect_s=5, first_byte_s=5, idle_s=5, total_s=5)
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize("bad", [b"this is no HTTP\r\n\r\n", b"HTTP/1.1 2"])
async def test_a_request_that_was_answered_in_part_is_not_sent_again(bad: bytes) -> None:
    """Though other connections to the same engine are free: it would do no better on those."""
    answers: list[bytes] = []
    together = asyncio.Barrier(3)

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await together.wait()  # so that each of the three has a connection of its own
        writer.write(GOOD)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            answers.append(bad)
            writer.write(bad)
        writer.close()

    async with await asyncio.start_server(engine, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(LIMITS)

        async def ask() -> bytes:
            reply = await upstream.post(f"http://127.0.0.1:{port}", "/v1/completions", [], b"")
            return await reply.read()

        assert list(await asyncio.gather(ask(), ask(), ask())) == [b"ok"] * 3
        with pytest.raises(UpstreamError):
            await ask()
        upstream.close()
        assert len(answers) == 1
