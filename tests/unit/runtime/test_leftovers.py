"""A packed body that nobody reads costs nothing to unpack."""

from __future__ import annotations

import asyncio
import gzip
from unittest.mock import Mock

import pytest
from aiohttp import StreamReader, web

from agent import server
from runtime.leftovers import drop_packed
from scheduler.admin import api

SIZE_BYTES = 128 * 2**20
BOMB = gzip.compress(bytes(SIZE_BYTES))


async def test_a_bomb_that_is_refused_is_not_unpacked() -> None:
    """The answer arrives, the connection ends, and what was unpacked is a few pieces."""
    seen: list[StreamReader] = []

    async def refuse(request: web.Request) -> web.Response:
        seen.append(request.content)
        await request.content.readany()
        return web.Response(status=413, text="too large")

    app = web.Application()
    app.on_response_prepare.append(drop_packed)
    app.router.add_post("/", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        writer.write((head % len(BOMB)).encode() + BOMB)
        async with asyncio.timeout(30):
            answer = await reader.readuntil(b"too large")
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(1)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 413")
        assert seen[0].total_bytes < SIZE_BYTES / 8
    finally:
        await runner.cleanup()


def test_the_scheduler_and_the_agent_do_so() -> None:
    parts = [Mock() for _ in range(6)]  # the configuration, the driver, ...
    assert drop_packed in api.make_app(*parts).on_response_prepare
    assert drop_packed in server.make_app(Mock(), "token").on_response_prepare
