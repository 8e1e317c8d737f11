"""Routes in a real scheduler: stored, published, counted, audited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import RegistryError
from runtime.wire.routes import DemandReport, RouteTable, TargetCounts
from scheduler import audit
from tests.kits.scheduler_http import A, Agent, Client, leading, scheduler, until

RULE = {"name": "r", "targets": [{"model": "a"}, {"model": "b", "weight": 0}]}
CANARY = {"model": "b", "steps": [10, 40], "interval_s": 0.2, "min_requests": 5}


class FlakyRegistry(EmbeddedRegistry):
    """One that can't write what is below `broken`."""

    broken = "/nothing/"

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        if self.broken in key:
            raise RegistryError("no write today")
        return await super().put(key, value, version)


@pytest.fixture
async def flaky(tmp_path) -> AsyncIterator[FlakyRegistry]:
    opened = FlakyRegistry(tmp_path / "registry.db")
    yield opened
    await opened.close()


async def with_models(client: Client, agent: Agent) -> None:
    await leading(client, agent)
    for name in ("a", "b"):
        assert (await client("POST", "/admin/models", {**A, "name": name}))[0] == 201


async def told(client: Client, seq: int, router: str = "r1", **counts: tuple[int, int]) -> None:
    """A router's counts: model -> (requests, errors), each with a TTFT of 0.1 s."""
    parts = tuple(
        TargetCounts(route="r", model=m, requests=n, errors=bad, first_bytes=n, first_byte_s=n / 10)
        for m, (n, bad) in counts.items()
    )
    report = DemandReport(router_id=router, boot_id=1, seq=seq, routes_version=2**60, targets=parts)
    assert (await client("POST", "/internal/demand", msgspec.json.encode(report)))[0] == 204


def weights(table: RouteTable) -> list[float]:
    return [t.weight for t in table.rules[0].targets]


async def next_table(client: Client, table: RouteTable) -> RouteTable:
    newer = await client.table(table.version, 10)
    assert newer is not None, "no newer table"
    return newer


async def test_a_canary_goes_its_steps_across_leaders(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        status, shown = await client("PUT", "/admin/routes/r", {**RULE, "canary": CANARY})
        assert (status, shown["canary"]["step"], shown["canary"]["share"]) == (201, 1, 10)
        table = await client.table()
        assert weights(table) == [90, 10]
        await told(client, 1)
        await told(client, 2, a=(9, 0), b=(5, 0))
        table = await next_table(client, table)
        assert weights(table) == [60, 40]
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        table = await client.table(0, 10)
        assert weights(table) == [60, 40]
        _, shown = await client("GET", "/admin/routes/r")
        assert (shown["canary"]["step"], shown["targets"][1]["requests"]) == (2, 0)
        await told(client, 3, a=(100, 0), b=(100, 0))  # counted before this leader: not looked at
        await told(client, 4, a=(105, 0), b=(104, 0))
        async with asyncio.timeout(20):
            while shown["canary"]["waits_for"] != "4 of min_requests 5 requests":
                _, shown = await client("GET", "/admin/routes/r")
        await told(client, 5, a=(105, 0), b=(105, 0))
        table = await next_table(client, table)
        assert weights(table) == [0, 100]
        assert table.rules[0].canary is None
        _, trail = await client("GET", "/admin/audit")
        assert [(e["number"], e["action"]) for e in trail["audit"]] == [
            (5, "promote"), (4, "step"), (3, "put"), (2, "create_model"), (1, "create_model"),
        ]  # fmt: skip


async def test_a_canary_that_was_rolled_back_stays_so(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        await client("PUT", "/admin/routes/r", {**RULE, "canary": CANARY})
        table = await client.table()
        await told(client, 1)
        await told(client, 2, a=(9, 0), b=(1, 1))
        table = await next_table(client, table)
        assert weights(table) == [100, 0]
        await told(client, 3, a=(90, 0), b=(90, 0))
        assert await client.table(table.version, 1.5) is None
        _, trail = await client("GET", "/admin/audit?route=r&limit=1")
        (last,) = trail["audit"]
        assert (last["action"], last["who"]) == ("rollback", "canary")
        assert last["reason"] == "1 errors in 1 requests: 2.0% is max_error_rate"
        assert last["at"].endswith("+00:00")


async def test_a_change_the_registry_did_not_take_is_not_made(
    tmp_path, agent, flaky, session
) -> None:
    async with scheduler(tmp_path, flaky) as url:
        client = Client(url, session)
        await with_models(client, agent)
        await client("PUT", "/admin/routes/r", RULE)
        table = await client.table()
        flaky.broken = "/routes/"
        changed = {**RULE, "sticky": "user"}
        status, body = await client("PUT", "/admin/routes/r", changed)
        assert (status, "nothing was changed" in body["error"]["message"]) == (503, True)
        assert (await client("GET", "/admin/routes/r"))[1]["rule"]["sticky"] == "off"
        assert await client.table(table.version) is None
        flaky.broken = "/audit/"
        assert (await client("PUT", "/admin/routes/r", changed))[0] == 200
        flaky.broken = "/nothing/"
        await until_audited(flaky, 4)  # two models, and the two changes


async def until_audited(registry: EmbeddedRegistry, count: int) -> None:
    async with asyncio.timeout(20):
        while len((await registry.list("stoker/audit/"))[0]) != count:
            await asyncio.sleep(0.05)


async def test_the_audit_trail_is_bounded_and_its_numbers_go_on(
    tmp_path, agent, registry, session, monkeypatch
) -> None:
    monkeypatch.setattr(audit, "KEPT", 3)
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        for _ in range(5):
            await client("PUT", "/admin/routes/r", RULE)
        await until_audited(registry, 3)
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        assert (await client("DELETE", "/admin/routes/r"))[0] == 204
        _, trail = await client("GET", "/admin/audit")
        assert [e["number"] for e in trail["audit"]] == [8, 7, 6]  # after two models
        assert (trail["audit"][0]["new"], trail["audit"][0]["action"]) == (None, "remove")


async def test_a_switch_waits_for_as_many_as_serve(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        await client("POST", "/admin/models/a/load", {})
        await until(lambda: len(agent.replicas) == 1, "a was told to start")
        await client.beat(agent)
        await client("PUT", "/admin/routes/r", RULE)
        table = await client.table()
        for body, status, words in (
            ({"to": "c"}, 422, "choose one of: a, b"),
            ({"to": "a"}, 409, "sends everything to 'a' already"),
            ({"to": "b", "deadline_s": 0}, 422, "deadline_s"),
        ):
            got, answer = await client("POST", "/admin/routes/r/switch", body)
            assert (got, words in answer["error"]["message"]) == (status, True), answer
        status, shown = await client("POST", "/admin/routes/r/switch", {"to": "b"})
        assert (status, shown["switch"]["replicas"], shown["switch"]["ready"]) == (202, 1, 0)
        status, answer = await client("POST", "/admin/routes/r/switch", {"to": "b"})
        assert (status, "roll that back first" in answer["error"]["message"]) == (409, True)
        await until(lambda: len(agent.replicas) == 2, "b was told to start")
        await asyncio.sleep(1.2)  # two looks: it starts, and has not told that it is ready
        assert weights(await client.table()) == [1, 0]
        await client.beat(agent)
        while weights(table) == [1, 0]:
            table = await next_table(client, table)
        assert weights(table) == [0, 100]
        assert {r.name: len(r.endpoints) for r in table.models} == {"a": 1, "b": 1}


async def test_errors_say_what_to_do(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        await client("PUT", "/admin/routes/r", {**RULE, "canary": CANARY})
        for method, path, body, status, words in (
            ("GET", "/admin/routes/rr", None, 404, "did you mean 'r'?"),
            ("DELETE", "/admin/routes/x", None, 404, "there is no route 'x'"),
            ("PUT", "/admin/routes/x", RULE, 422, "is not the name in the address"),
            ("PUT", "/admin/routes/r", b"{", 400, "not JSON"),
            ("PUT", "/admin/routes/r", {**RULE, "mirrors": 1}, 422, "did you mean 'mirror'?"),
            ("POST", "/admin/routes/r/switch", {"to": "b"}, 409, "promote it or roll it back"),
            ("POST", "/admin/routes/r/promote", {"why": 1}, 422, "why"),
            ("GET", "/admin/audit?limit=-1", None, 400, "limit"),
            ("DELETE", "/admin/models/b", None, 409, "is used by route 'r'"),
            ("POST", "/admin/models", {**A, "name": "c", "aliases": ["r"]}, 409, "of route 'r'"),
        ):
            got, answer = await client(method, path, body)
            assert (got, words in answer["error"]["message"]) == (status, True), (path, answer)


async def test_the_trail_names_who_did_it(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        tokens = {}
        for name, role in (("ann", "admin"), ("eve", "viewer")):
            _, made = await client("POST", "/admin/tokens", {"name": name, "role": role})
            tokens[name] = made["token"]
        assert (await client("PUT", "/admin/routes/r", RULE, token=tokens["eve"]))[0] == 403
        assert (await client("PUT", "/admin/routes/r", RULE, token=tokens["ann"]))[0] == 201
        await client("DELETE", "/admin/routes/r")
        status, trail = await client("GET", "/admin/audit", token=tokens["eve"])
        assert status == 200
        routes = [e["who"] for e in trail["audit"] if e["subject"] == "route r"]
        assert routes == ["cluster", "ann"]


async def test_without_the_token_nothing_is_told(tmp_path, agent, registry) -> None:
    async with scheduler(tmp_path, registry) as url, aiohttp.ClientSession() as session:
        client = Client(url, session)
        await leading(client, agent)
        assert (await client("GET", "/admin/audit", token="wrong"))[0] == 401
        assert (await client("PUT", "/admin/routes/r", RULE, token="wrong"))[0] == 401


async def test_a_pending_switch_can_be_called_off(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await with_models(client, agent)
        await client("PUT", "/admin/routes/r", RULE)
        agent.refuse = "not today"
        await client("POST", "/admin/routes/r/switch", {"to": "b"})
        status, shown = await client("POST", "/admin/routes/r/rollback", {"reason": "too slow"})
        assert (status, shown["switch"]) == (200, None)
        assert [t["share"] for t in shown["targets"]] == [100, 0]
        _, trail = await client("GET", "/admin/audit?limit=1")
        assert trail["audit"][0]["reason"] == "the switch to b was called off: too slow"
