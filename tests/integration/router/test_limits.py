"""The router's limits: time, connections, replicas that fail, and several workers on one port."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import aiohttp
import pytest

from runtime.router.control import saved_tables
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable
from tests.kits import router_stack as kit
from tests.kits.router_stack import Engine, eventually, never, sse, unary
from tests.kits.router_workers import workers

CHAT = "/v1/chat/completions"


async def code_of(response: aiohttp.ClientResponse) -> str:
    return (await response.json())["error"]["code"]


async def only_headers(received: kit.Received, writer: asyncio.StreamWriter) -> None:
    writer.write(kit.SSE_HEAD)
    await asyncio.Event().wait()


@pytest.mark.parametrize("answer", [never, only_headers])
async def test_no_first_byte_in_time_is_504_and_not_tried_again(
    tmp_path: Path, answer: kit.Answer
) -> None:
    async with kit.stack(tmp_path, first_byte_timeout_s=0.3) as stack:
        first, other = await stack.engine(answer), await stack.engine(answer)
        await stack.serve("m", first, other)
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert (response.status, await code_of(response)) == (504, "first_byte_timeout")
        assert len(first.received) + len(other.received) == 1
        await eventually(lambda: first.hung_up + other.hung_up == 1, "the engine still works")


async def test_a_stream_that_falls_silent_is_broken_off(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, idle_timeout_s=0.3) as stack:
        engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=asyncio.Event()))
        await stack.serve("m", engine)
        async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
            assert await response.content.readany() == b"data: 1\n\n"
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()
        await eventually(lambda: engine.hung_up == 1, "the engine still works")


async def test_a_stream_that_never_ends_is_broken_off(tmp_path: Path) -> None:
    async def without_end(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(kit.SSE_HEAD)
        while True:
            writer.write(kit.chunk(b"data: x\n\n"))
            await writer.drain()
            await asyncio.sleep(0.02)

    async with kit.stack(tmp_path, total_timeout_s=0.8, idle_timeout_s=0.4) as stack:
        await stack.serve("m", await stack.engine(without_end))
        async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()


async def test_a_host_that_accepts_no_connection_is_left_for_another(tmp_path: Path) -> None:
    """A listener with a full backlog is as deaf as a host that is gone."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        async with kit.stack(tmp_path, connect_timeout_s=0.3) as stack:
            engine = await stack.engine(unary())
            gone = Endpoint(
                replica_id="gone", base_url=f"http://127.0.0.1:{deaf.getsockname()[1]}", key="k"
            )
            route = ModelRoute(name="m", endpoints=(gone, engine.endpoint))
            await stack.scheduler.publish(route)
            await stack.scheduler.in_force()
            for _ in range(4):
                async with stack.post(CHAT, {"model": "m"}) as response:
                    assert response.status == 200
            assert len(engine.received) == 4
        for filler in fillers:
            filler.close()


async def test_a_replica_that_answers_500_is_left_for_another(tmp_path: Path) -> None:
    async with kit.stack(tmp_path) as stack:
        bad, good = await stack.engine(unary(b"{}", "500 No")), await stack.engine(unary())
        await stack.serve("m", bad, good)
        statuses = []
        for _ in range(40):
            async with stack.post(CHAT, {"model": "m"}) as response:
                statuses.append(response.status)
        assert statuses.count(500) == 5
        assert len(good.received) == 35


async def test_what_a_replica_may_not_take_yet_waits_its_turn(tmp_path: Path) -> None:
    more = asyncio.Event()
    async with kit.stack(tmp_path, max_in_flight=2) as stack:
        engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=more))
        await stack.serve("m", engine, max_queue=1)
        calls = [asyncio.create_task(stack.post(CHAT, {"model": "m"}).__aenter__()) for _ in "123"]
        await eventually(lambda: stack.scheduler.waiting() == 1, "not held")
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert (response.status, await code_of(response)) == (429, "queue_full")
            assert response.headers["Retry-After"] == "5"
        assert len(engine.received) == 2
        more.set()
        for call in calls:
            assert await (await call).read() == b"data: 1\n\ndata: 2\n\n"


HELD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 27\r\n\r\n{"model": "m", "prompt": 1}'
)


async def test_the_last_connection_too_many_is_told_so(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, max_connections=2) as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        await stack.serve("m", warmth="cold")
        kept = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        for _, held in kept:  # a connection that only waits would give way to the new one
            held.write(HELD)
        await kit.eventually(lambda: stack.scheduler.waiting() == 2, "not held")
        reader, writer = await asyncio.open_connection(host, int(port))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert (
            json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        )
        for _, open_writer in [*kept, (reader, writer)]:
            open_writer.close()


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    ],
)
@pytest.mark.parametrize("odd", ["", "Content-Encoding: identity\r\n"])
async def test_a_request_that_does_not_arrive_ends(tmp_path: Path, head: str, odd: str) -> None:
    async with kit.stack(tmp_path, read_timeout_s=0.5) as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.replace("\r\n", "\r\n" + odd, 1).encode())
        async with asyncio.timeout(kit.DEADLINE_S):
            answer = await reader.read()
        assert not answer or b" 408 " in answer.partition(b"\r\n")[0]
        writer.close()


async def test_a_file_that_drips_in_ends(tmp_path: Path) -> None:
    """A byte now and then is no upload: it would hold its memory as long as its sender likes."""
    async with kit.stack(tmp_path, read_timeout_s=0.5) as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))

        def answered() -> bool:
            writer.write(b"a\n")
            return answer.done()

        await eventually(answered, "it may go on for hours")
        assert b" 408 " in answer.result().partition(b"\r\n")[0]
        writer.close()


@pytest.mark.parametrize("odd", ["", "Content-Encoding: identity\r\n"])
async def test_a_caller_who_reads_nothing_is_closed(tmp_path: Path, odd: str) -> None:
    """Else a replica works for nobody, and its place is taken as long as the caller likes."""

    ended = asyncio.Event()

    async def flood(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(kit.SSE_HEAD)
        try:
            while True:
                writer.write(b"10000\r\n%b\r\n" % (b"x" * 65536))
                await writer.drain()
        finally:
            ended.set()

    async with kit.stack(tmp_path, read_timeout_s=0.5) as stack:
        engine = await stack.engine(flood)
        await stack.serve("m", engine)
        host, port = stack.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = b'{"model":"m","stream":true}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + odd.encode() +
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )  # fmt: skip
        async with asyncio.timeout(kit.DEADLINE_S):
            await ended.wait()
        writer.close()


async def test_demand_tells_arrivals_and_ttft(tmp_path: Path) -> None:
    async with kit.stack(tmp_path) as stack:
        await stack.serve("m", await stack.engine(unary()))
        for _ in range(3):
            async with stack.post(CHAT, {"model": "m"}):
                pass

        def told() -> bool:
            (demand,) = stack.scheduler.reports[-1].models or (None,)
            return demand is not None and demand.arrived == 3

        await eventually(told, "not told")
        ttft_s = stack.scheduler.reports[-1].models[0].ttft_p95_s
        assert ttft_s is not None
        assert 0 < ttft_s < 5


# ------------------------------------------------------------------------------------- workers


async def test_workers_share_a_port_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    engine = await Engine(unary()).start("replica")
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )

    async def call(url: str) -> int:
        async with (
            aiohttp.ClientSession() as session,  # a new connection: any worker may get it
            session.post(url + CHAT, json={"model": "m"}) as response,
        ):
            return response.status

    async with workers(tmp_path, 2) as (parent, url):
        assert [await call(url) for _ in range(40)] == [200] * 40
        children = parent.children()
        assert len(children) == 2
        async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
            assert 'llm_inference_requests_total{model="m",status="200",version=""} 40.0' in (
                await response.text()
            )
        assert all(child.net_connections("tcp") for child in children)
        children[0].kill()

        def replaced() -> bool:
            now = parent.children()
            return len(now) == 2 and children[0].pid not in {child.pid for child in now}

        await eventually(replaced, "not replaced")
        last = parent.children()
        assert [await call(url) for _ in range(20)] == [200] * 20
    assert not [child for child in last if child.is_running()]
    engine.kill()


async def test_workers_write_one_access_log_to_standard_output(tmp_path: Path) -> None:
    engine = await Engine(unary()).start("replica")
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )
    output: list[bytes] = []
    async with workers(tmp_path, 2, "-", output) as (_, url):
        for number in range(20):
            async with (
                aiohttp.ClientSession(headers={"X-Request-ID": f"r{number}"}) as session,
                session.post(url + CHAT, json={"model": "m"}) as response,
            ):
                assert response.status == 200
    engine.kill()
    lines = [json.loads(line) for line in output[0].splitlines()]
    assert {line["request_id"] for line in lines} == {f"r{number}" for number in range(20)}
    assert len(lines) == 20
