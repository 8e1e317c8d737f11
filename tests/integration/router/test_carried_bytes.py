"""Bytes between real sockets: a request and its answer reach the other side as they were."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from tests.kits import router_stack as kit
from tests.kits.router_stack import KEY, Stack, error_of, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


async def test_a_request_reaches_the_engine_unchanged_but_for_the_keys(stack: Stack) -> None:
    engine = await stack.engine(
        unary(b'{"id": 1.00}', "201 Created", "X-Engine: a\r\nX-Engine: b\r\n")
    )
    await stack.serve("m", engine)
    body = b'{ "model":"m", "n": 1.0e2,"text":"\\u00e9\xc3\xa9" }\n'
    headers = {
        "Authorization": "Bearer the-client's",
        "X-Request-ID": "mine-1",
        "X-Custom": "kept",
        "X-Stoker-Model": "another",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "dropped",
        "Content-Type": "application/json",
    }
    async with stack.post(CHAT + "?a=b%20c", body, headers=headers) as response:
        assert response.status == 201
        assert await response.read() == b'{"id": 1.00}'
        assert response.headers.getall("X-Engine") == ["a", "b"]
        assert response.headers["X-Request-ID"] == "mine-1"
    (received,) = engine.received
    assert received.target == CHAT + "?a=b%20c"
    assert received.body == body
    assert [v for n, v in received.headers if n.lower() == "authorization"] == [f"Bearer {KEY}"]
    assert received.header("X-Request-ID") == "mine-1"
    assert received.header("X-Custom") == "kept"
    assert [v for n, v in received.headers if n.lower() == "x-stoker-model"] == ["m"]
    assert received.header("Content-Type") == "application/json"
    assert received.header("X-Hop") is None


async def test_a_request_id_is_made_where_there_is_none_worth_keeping(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m"}, headers={"X-Request-ID": "no spaces"}) as response:
        made = response.headers["X-Request-ID"]
    assert len(made) == 32
    assert engine.received[0].header("X-Request-ID") == made


@pytest.mark.parametrize("seed", range(6))
async def test_streams_pass_byte_for_byte_however_they_are_split(stack: Stack, seed: int) -> None:
    rng = random.Random(seed)
    payload = [rng.randbytes(rng.choice((1, 2, 7, 180, 5000, 70_000))) for _ in range(60)]
    raw = kit.SSE_HEAD + b"".join(map(kit.chunk, payload)) + b"0\r\nX-Trailer: t\r\n\r\n"

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        left = raw
        while left:
            size = rng.choice((1, 3, 50, 1000, 60_000))
            writer.write(left[:size])
            left = left[size:]
            await writer.drain()
            if rng.random() < 0.3:
                await asyncio.sleep(0)

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    for _ in range(2):
        async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert await response.read() == b"".join(payload)
    assert engine.connections == 1, "the connection was not kept"


async def test_events_are_not_delayed(stack: Stack) -> None:
    more = asyncio.Event()
    engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=more))
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        assert await response.content.readany() == b"data: 1\n\n"
        more.set()
        assert await response.content.read() == b"data: 2\n\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nuntil the end",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nuntil the end",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 13\r\n\r\nuntil the end",
    ],
)
async def test_every_framing_of_an_answer(stack: Stack, raw: bytes) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        writer.close()

    await stack.serve("m", await stack.engine(answer))
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert (response.status, await response.read()) == (200, b"until the end")


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_not_http_is_502(stack: Stack, raw: bytes) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        writer.close()

    # Three replicas, of which two are tried: it could be the request that breaks them.
    await stack.serve("m", *[await stack.engine(answer) for _ in range(3)])
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.status == 502
        assert (await error_of(response))["code"] == "replica_failed"
    assert [len(engine.received) for engine in stack.engines] == [1, 1, 0]


async def test_a_second_answer_after_the_first_is_never_given_to_anyone(stack: Stack) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        one = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        writer.write(one + str(len(engine.received)).zfill(2).encode() + one + b"no")
        await writer.drain()

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    for expected in (b"01", b"02", b"03"):
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert await response.read() == expected


async def test_a_connection_the_engine_closed_while_idle_is_replaced(stack: Stack) -> None:
    """The engine closes only when the next request has come, as when uvicorn's timer wins."""

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        if len(engine.received) == 2:
            writer.transport.abort()
            return
        await unary()(received, writer)

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    for _ in range(2):
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert response.status == 200
    assert (len(engine.received), engine.connections) == (3, 2)


async def test_a_large_body_goes_up_and_comes_back(stack: Stack) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        await unary(received.body)(received, writer)

    await stack.serve("m", await stack.engine(answer))
    body = json.dumps({"model": "m", "input": "x" * 8_000_000}).encode()
    async with stack.post("/v1/embeddings", body) as response:
        assert await response.read() == body
