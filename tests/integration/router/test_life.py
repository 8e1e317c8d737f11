"""A router's life: its link to the scheduler, its saved table, its start, drain and end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from runtime.router.control import saved_tables
from runtime.wire.routes import RouteTable
from tests.kits import router_stack as kit
from tests.kits.checkout import ROOT
from tests.kits.router_stack import Engine, Stack, error_of, eventually, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


async def test_not_ready_until_there_is_a_table(stack: Stack) -> None:
    async def status(path: str) -> int:
        async with stack.session.get(stack.url + path) as response:
            return response.status

    assert (await status("/healthz"), await status("/readyz")) == (200, 503)
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert (await error_of(response))["code"] == "no_routes"
    await stack.serve("m")
    assert await status("/readyz") == 200


async def test_it_serves_on_while_scheduler_and_registry_are_down(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    stack.registry.down = True
    await stack.scheduler.stop()
    for _ in range(20):
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert response.status == 200
        await asyncio.sleep(0.01)


async def test_a_new_leader_is_found_and_its_table_taken(stack: Stack) -> None:
    old, new = await stack.engine(unary(b'"old"')), await stack.engine(unary(b'"new"'))
    await stack.scheduler.publish(kit.model("m", old), version=1000)
    await stack.scheduler.in_force()
    await stack.scheduler.stop()
    stack.scheduler = kit.Scheduler()
    await stack.scheduler.start(stack.registry, term=2)
    await stack.scheduler.publish(kit.model("m", new), version=7)  # set up again: it counts again
    await stack.scheduler.in_force()
    assert stack.scheduler.polls[0] == 0
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert await response.read() == b'"new"'


async def test_a_leader_of_an_older_term_is_not_listened_to(stack: Stack) -> None:
    await stack.scheduler.stop()
    stack.scheduler = kit.Scheduler()
    await stack.scheduler.start(stack.registry, term=5)
    await stack.serve("m", await stack.engine(unary(b'"now"')))
    await stack.scheduler.stop()
    deposed = kit.Scheduler()
    await deposed.start(stack.registry, term=4)
    await deposed.publish(kit.model("m"))
    looked = 0
    original = stack.registry.get

    async def counted(key: str) -> Any:
        nonlocal looked
        looked += 1
        return await original(key)

    stack.registry.get = counted  # type: ignore[method-assign]
    await eventually(lambda: looked >= 3, "the leader was not looked up")
    assert not deposed.polls
    assert not deposed.reports
    await deposed.stop()


async def test_an_older_table_of_the_same_leader_is_ignored(stack: Stack) -> None:
    await stack.scheduler.publish(kit.model("m", await stack.engine(unary(b'"good"'))), version=10)
    await stack.scheduler.in_force()
    await stack.scheduler.publish(kit.model("m", refusal="stale"), version=9)
    polls = stack.scheduler.polls
    count = len(polls)
    await eventually(lambda: len(polls) > count + 1, "it did not poll on")
    assert polls[-1] == 10
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert await response.read() == b'"good"'


async def test_it_registers_and_withdraws(stack: Stack) -> None:
    (service,) = await eventually(lambda: tuple(stack.registry.registered.values()), "unregistered")
    assert service.name == "stoker-router"
    assert stack.url == f"http://{service.address}:{service.port}"
    await stack.ask_to_stop()
    assert not stack.registry.registered


# ------------------------------------------------------------------------------------- its life


@contextlib.asynccontextmanager
async def router_process(state_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", kit.__name__, str(state_dir),
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(kit.DEADLINE_S):
            url = (await process.stdout.readline()).decode().strip()
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def started(answer: kit.Answer) -> Engine:
    return await Engine(answer).start("replica")


async def test_the_table_is_kept_readable_by_its_owner_only(stack: Stack, tmp_path: Path) -> None:
    await stack.serve("m", await stack.engine(unary()))
    file = tmp_path / "routes.json"
    await eventually(file.exists, "not written")
    assert file.stat().st_mode & 0o777 == 0o600
    assert saved_tables.load(file, RouteTable) == stack.scheduler.table


async def test_a_restarted_router_serves_with_everything_else_down(tmp_path: Path) -> None:
    engine = await started(unary(b'"here"'))
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )
    async with router_process(tmp_path) as (process, url), aiohttp.ClientSession() as session:
        async with session.post(url + CHAT, json={"model": "m"}) as response:
            assert await response.read() == b'"here"'
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    engine.kill()


async def test_a_damaged_table_file_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "routes.json").write_bytes(b'{"version": "')
    async with kit.stack(tmp_path) as stack:
        await stack.serve("m", await stack.engine(unary()))
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert response.status == 200


async def test_streams_under_way_end_before_it_does(stack: Stack) -> None:
    more = asyncio.Event()
    engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=more))
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        await response.content.readany()
        ending = stack.ask_to_stop()
        host, port = stack.url.removeprefix("http://").split(":")

        def refuses() -> bool:
            import socket

            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) != 0

        await eventually(refuses, "it still accepts")
        assert not ending.done()
        more.set()
        assert await response.content.read() == b"data: 2\n\n"
    await ending


@pytest.mark.parametrize("odd", ["", "Expect: 100-continue\r\n"], ids=["plain", "odd"])
async def test_who_connected_before_its_end_is_answered(stack: Stack, odd: str) -> None:
    """Its request was on the way: a caller that knows only of its own connection loses nothing."""
    await stack.serve("m", await stack.engine(unary(b'"here"')))
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with stack.post(CHAT, {"model": "m"}) as later:  # so ours has been accepted
        assert later.status == 200
    ending = stack.ask_to_stop()
    await asyncio.sleep(0.1)
    body = '{"model": "m"}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{odd}"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    async with asyncio.timeout(kit.DEADLINE_S):
        said = await reader.read()
    assert b" 200 OK\r\n" in said
    assert b'"here"' in said
    writer.close()
    await ending


async def test_who_connected_and_asks_nothing_holds_up_no_end(stack: Stack) -> None:
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(4.0):  # drain_s is 5
        await stack.ask_to_stop()
        assert await reader.read() == b""
    writer.close()


async def test_a_client_that_does_not_read_does_not_fill_the_routers_memory(tmp_path: Path) -> None:
    total, piece = 200 * 2**20, b"x" * 65536
    written = 0

    async def flood(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while written < total:
            writer.write(piece)
            await writer.drain()
            written += len(piece)

    engine = await started(flood)
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )
    async with router_process(tmp_path) as (process, url):
        memory = psutil.Process(process.pid)
        before = memory.memory_info().rss
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, port, limit=65536)
        body = b'{"model":"m"}'
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        await reader.readuntil(b"\r\n\r\n")
        transport: Any = vars(reader)["_transport"]
        transport.pause_reading()
        stalled = await settled(lambda: written)
        assert 0 < stalled < total / 4, "the engine was not slowed down"
        assert memory.memory_info().rss - before < 32 * 2**20
        transport.resume_reading()
        left = total
        while left:
            left -= len(await reader.read(2**20))
        writer.close()
        assert memory.memory_info().rss - before < 48 * 2**20
    engine.kill()


async def settled(value: Callable[[], int]) -> int:
    """The value once it has not moved for a while."""
    last, same = value(), 0
    async with asyncio.timeout(kit.DEADLINE_S):
        while same < 30:
            await asyncio.sleep(0.02)
            same = same + 1 if value() == last and last else 0
            last = value()
    return last
