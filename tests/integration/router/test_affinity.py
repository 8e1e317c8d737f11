"""Calls that share a session or a beginning, through a whole router to two real sockets."""

from __future__ import annotations

import pytest

from tests.kits.router_stack import Engine, Stack, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"
SESSIONS = [f"session-{index}" for index in range(12)]


async def two(stack: Stack, **fields: str) -> list[Engine]:
    engines = [await stack.engine(unary()) for _ in range(2)]
    await stack.serve("m", *engines, **fields)
    return engines


async def call(
    stack: Stack, engines: list[Engine], headers: dict | None = None, **fields: object
) -> Engine:
    """Who answered; it must have been one, and well."""
    before = [len(engine.received) for engine in engines]
    async with stack.post(CHAT, {"model": "m"} | fields, headers=headers) as response:
        assert response.status == 200
        await response.read()
    (got,) = (e for e, had in zip(engines, before, strict=True) if len(e.received) > had)
    return got


async def test_sessions_stick_to_their_replicas_and_leave_a_dead_one(stack: Stack) -> None:
    engines = await two(stack)

    async def turn(session: str) -> Engine:
        return await call(stack, engines, {"X-Session-Id": session}, messages=[])

    first = {session: await turn(session) for session in SESSIONS}
    assert set(first.values()) == set(engines)
    for _ in range(3):
        assert {session: await turn(session) for session in SESSIONS} == first
    assert all(r.header("x-session-id") in SESSIONS for e in engines for r in e.received)
    dead, alive = engines
    dead.kill()
    assert {await turn(session) for session in SESSIONS} == {alive}


async def test_a_growing_chat_stays_where_it_began(stack: Stack) -> None:
    engines = await two(stack)
    for chat in range(6):
        messages = [{"role": "user", "content": f"{chat}: " + "x" * 3000}]
        places = set()
        for turn in range(4):
            places.add(await call(stack, engines, messages=messages))
            messages += [
                {"role": "assistant", "content": f"{turn} " * 300},
                {"role": "user", "content": "go on"},
            ]
        assert len(places) == 1, f"chat {chat} moved"


async def test_users_stick_unless_affinity_is_off(stack: Stack) -> None:
    engines = await two(stack)
    assert len({await call(stack, engines, user="u", messages=[]) for _ in range(6)}) == 1
    await stack.serve("m", *engines, affinity="off")
    places = [await call(stack, engines, user="u", messages=[]) for _ in range(6)]
    assert places[::2] == places[:1] * 3
    assert places[1::2] == places[1:2] * 3
    assert places[0] is not places[1]
