"""A second replica is asked when the first is slow: who is heard, and what it may cost."""

from __future__ import annotations

import asyncio

import pytest

from tests.kits.router_stack import Engine, Received, Stack, eventually, never, unary

pytestmark = pytest.mark.both_doors

EMBED = "/v1/embeddings"


async def ask(stack: Stack, path: str = EMBED) -> tuple[int, bytes]:
    async with stack.post(path, {"model": "m", "input": "x"}) as response:
        return response.status, await response.read()


def sent(*engines: Engine) -> int:
    return sum(len(engine.received) for engine in engines)


async def test_the_quicker_one_is_heard_and_the_other_hung_up_on(stack: Stack) -> None:
    slow, quick = await stack.engine(never), await stack.engine(unary(b'{"by":"quick"}'))
    await stack.serve("m", slow, quick, hedge_after_s=0.05)
    for _ in range(2):  # whichever of them is asked first
        assert await ask(stack) == (200, b'{"by":"quick"}')
    won = sent(slow)
    assert won >= 1
    await eventually(lambda: slow.hung_up == won, "the slow engine still works")
    told = f'stoker_router_hedged_requests_total{{model="m",result="won"}} {won}.0'
    assert told in await stack.metrics()
    await eventually(lambda: stack.scheduler.reports[-1].in_flight == {}, "all is over")


async def test_the_first_may_win_yet(stack: Stack) -> None:
    async def in_a_while(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await unary(b'{"by":"first"}')(received, writer)

    first, second = await stack.engine(in_a_while), await stack.engine(never)
    await stack.serve("m", first, second, hedge_after_s=0.05)
    assert (await ask(stack))[0] == 200
    assert sent(first, second) == 2
    await eventually(lambda: second.hung_up == 1, "the second engine still works")
    assert 'result="lost"} 1.0' in await stack.metrics()


async def test_a_second_that_fails_is_nobodys_affair(stack: Stack) -> None:
    async def in_a_while(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await unary(b'{"by":"first"}')(received, writer)

    for broken in (unary(b"{}", "500 Oh"), unary(b"{}", "401 Unauthorized")):
        first, second = await stack.engine(in_a_while), await stack.engine(broken)
        await stack.serve("m", first, second, hedge_after_s=0.05)
        while not sent(second):
            status, _ = await ask(stack)
            assert status in (200, 500)  # 500: it was asked first, and alone in time
        assert await ask(stack) == (200, b'{"by":"first"}')


async def test_what_may_not_be_made_twice_is_not(stack: Stack) -> None:
    async def in_a_while(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await unary()(received, writer)

    one, two = await stack.engine(in_a_while), await stack.engine(in_a_while)
    await stack.serve("m", one, two, hedge_after_s=0.02)
    assert (await ask(stack, "/v1/chat/completions"))[0] == 200
    assert sent(one, two) == 1
    await stack.serve("m", one, two)
    assert (await ask(stack))[0] == 200
    assert sent(one, two) == 2


async def test_with_one_replica_there_is_nobody_to_ask(stack: Stack) -> None:
    async def in_a_while(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await unary()(received, writer)

    only = await stack.engine(in_a_while)
    await stack.serve("m", only, hedge_after_s=0.02)
    assert (await ask(stack))[0] == 200
    assert sent(only) == 1


async def test_a_cluster_that_is_slow_as_a_whole_does_not_get_twice_the_load(stack: Stack) -> None:
    async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        await unary()(received, writer)

    engines = [await stack.engine(slow) for _ in range(2)]
    await stack.serve("m", *engines, hedge_after_s=0.02, target_concurrency=1000)
    calls = 400
    answers = await asyncio.gather(*(ask(stack) for _ in range(calls)))
    assert {status for status, _ in answers} == {200}
    assert calls + 50 < sent(*engines) <= calls + 100  # breaker.FREE_RETRIES
    await eventually(lambda: stack.scheduler.reports[-1].in_flight == {}, "all is over")
