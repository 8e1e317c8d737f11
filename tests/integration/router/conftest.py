"""What the router's tests share: the event loop it runs on, its doors, and a running router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack

# Calls that the front answers itself, and those that it leaves to aiohttp's server.
DOORS = ("plain", "handed over")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on what the router runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "door" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_doors"):
        metafunc.parametrize("door", DOORS)


@pytest.fixture
def door() -> str:
    """The door that `stack` is called at; marked `both_doors`, a test runs once for each."""
    return DOORS[0]


@pytest.fixture
async def stack(tmp_path: Path, door: str) -> AsyncIterator[Stack]:
    """A running router tied to a running scheduler."""
    async with kit.stack(tmp_path) as made:
        if door == "handed over":
            made.make_calls_odd()
        yield made
