"""How a router reads the key of a call, at both of its doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.contract.access import Scope
from tests.kits import router_stack as kit
from tests.kits.bearer_headers import cases, status_of
from tests.kits.router_keys import ask, key, token
from tests.kits.router_stack import Stack, unary

pytestmark = pytest.mark.both_doors
CHAT = "/v1/chat/completions"


@pytest.fixture
async def stack(tmp_path: Path, door: str) -> AsyncIterator[Stack]:
    """A router that has one model, `m`, and lets in two keys alone: `a` for it, `b` for another."""
    async with kit.stack(tmp_path, anonymous="off") as made:
        if door == "handed over":
            made.make_calls_odd()
        await made.serve("m", await made.engine(unary()))
        other = key("b", "acme", scope=Scope(models=("n",)))
        await made.scheduler.publish_keys(key("a", "acme"), other)
        async with asyncio.timeout(kit.DEADLINE_S):
            while (await ask(made, "a", "POST", CHAT, {"model": "m"}))[0] != 200:
                await asyncio.sleep(0.02)
        yield made


async def test_a_token_is_read_as_everywhere_and_may_come_without_a_scheme(stack: Stack) -> None:
    bare = (f"Authorization: {token('a')}".encode(), True)
    for lines, opens in [*cases(token("a")), bare]:
        assert await status_of(stack.url, "/v1/models", lines) == (200 if opens else 401), lines


async def test_an_authorization_counts_before_an_api_key_wherever_it_stands(stack: Stack) -> None:
    mine, other = {"Authorization": f"Bearer {token('a')}"}, {"X-Api-Key": token("b")}
    for headers, expected in ((mine | other, 200), (other | mine, 200), (other, 403)):
        async with stack.post(CHAT, {"model": "m"}, headers=headers) as response:
            assert response.status == expected, headers
