"""A host that says nothing any more: what the router does when the scheduler calls it lost."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.kits import router_stack as kit
from tests.kits.router_stack import Engine, Stack, eventually, never, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"
DEADLINE_S = 20.0
EVENTS = (b"data: 1\n\n", b"data: [DONE]\n\n")


def call(stack: Stack, **fields: object) -> asyncio.Task[aiohttp.ClientResponse]:
    return asyncio.create_task(stack.post(CHAT, {"model": "m", **fields}).__aenter__())


async def lose(stack: Stack, lost: Engine, *serving: Engine) -> None:
    """The scheduler calls the host of `lost` lost."""
    assert lost.endpoint is not None
    await stack.scheduler.publish(kit.model("m", *serving), lost=(lost.endpoint.base_url,))
    await stack.scheduler.in_force()


async def test_a_call_without_its_first_byte_is_answered_elsewhere(stack: Stack) -> None:
    silent, other = await stack.engine(never), await stack.engine(unary())
    await stack.serve("m", silent, target_concurrency=4)
    calls = [call(stack) for _ in range(4)]
    await eventually(lambda: len(silent.received) == 4, "not sent")
    await lose(stack, silent, other)
    async with asyncio.timeout(DEADLINE_S):
        assert [(await c).status for c in calls] == [200] * 4
    assert len(other.received) == 4


async def test_a_call_on_a_pooled_connection_is_not_sent_to_the_lost_host_again(
    stack: Stack,
) -> None:
    quick = unary()

    async def first_only(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        await (quick if b"first" in received.body else never)(received, writer)

    silent, other = await stack.engine(first_only), await stack.engine(unary())
    await stack.serve("m", silent)
    assert (await call(stack, user="first")).status == 200
    late = call(stack)
    await eventually(lambda: len(silent.received) == 2, "not sent")
    assert silent.connections == 1
    await lose(stack, silent, other)
    async with asyncio.timeout(DEADLINE_S):
        assert (await late).status == 200
    assert silent.connections == 1


async def test_where_no_other_serves_it_is_held_for_one(stack: Stack) -> None:
    silent, other = await stack.engine(never), await stack.engine(unary())
    await stack.serve("m", silent)
    waits = call(stack)
    await eventually(lambda: silent.received, "not sent")
    await lose(stack, silent)
    await eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    await stack.serve("m", other)
    async with asyncio.timeout(DEADLINE_S):
        assert (await waits).status == 200


async def test_a_stream_in_its_middle_is_broken_off_visibly(stack: Stack) -> None:
    silent = await stack.engine(sse(*EVENTS, hold=asyncio.Event()))
    other = await stack.engine(sse(*EVENTS))
    await stack.serve("m", silent)
    url = urlsplit(stack.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)  # to see every byte
    body = b'{"model": "m", "stream": true}'
    odd = b"Content-Encoding: identity\r\n" if "Content-Encoding" in stack.session.headers else b""
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n%b"
        b"Content-Length: %d\r\n\r\n%b" % (CHAT.encode(), url.netloc.encode(), odd, len(body), body)
    )
    try:
        assert (await reader.readuntil(EVENTS[0])).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(4.0)  # silent for so long; a node is called lost after 10 s
        await lose(stack, silent, other)
        async with asyncio.timeout(DEADLINE_S):
            rest = await reader.read()
    finally:
        writer.close()
    assert b"host no longer answers" in rest
    assert EVENTS[1] not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert not other.received


async def test_a_stream_that_still_flows_goes_on(stack: Stack) -> None:
    """It is the scheduler that cannot see the host: nobody is cut off for that."""
    ended = asyncio.Event()

    async def flows(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(kit.SSE_HEAD)
        while not ended.is_set():
            writer.write(kit.chunk(EVENTS[0]))
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.write(kit.chunk(EVENTS[1]) + b"0\r\n\r\n")

    engine = await stack.engine(flows)
    await stack.serve("m", engine)
    response = await call(stack, stream=True)
    assert await response.content.readuntil(b"\n\n") == EVENTS[0]
    await lose(stack, engine, engine)
    ended.set()
    async with asyncio.timeout(DEADLINE_S):
        assert (await response.read()).endswith(EVENTS[1])
