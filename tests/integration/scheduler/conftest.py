"""What the scheduler's tests share: an agent that is a small web app, a registry, a session."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from runtime.registry.embedded import EmbeddedRegistry
from tests.kits.scheduler_http import Agent


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    fake = Agent()
    app = web.Application()
    app.router.add_post("/agent/commands", fake.commands)
    app.router.add_post("/agent/inspect", fake.inspect)
    app.router.add_get("/agent/replicas/{id}/logs", fake.logs)
    app.router.add_route("*", "/{rest:.*}", fake.other)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


@pytest.fixture
async def registry(tmp_path) -> AsyncIterator[EmbeddedRegistry]:
    opened = EmbeddedRegistry(tmp_path / "registry.db")
    yield opened
    await opened.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened
