"""Which scheduler leads, what survives its restart, and what it says while it cannot lead."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp

from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import RegistryError
from tests.kits.scheduler_http import A, Client, leading, scheduler, until


async def test_specs_pins_and_cordons_survive_a_restart(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        await client("POST", "/admin/models", A)
        await client("POST", "/admin/nodes/n1/cordon")
        await client("POST", "/admin/models/a/pin", {"pinned": True})
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        _, health = await client("GET", "/healthz")
        assert health["term"] == 2
        _, model = await client("GET", "/admin/models/a")
        assert model["pinned"] is True
        await client.beat(agent)
        assert (await client("GET", "/admin/nodes"))[1]["nodes"][0]["state"] == "cordoned"
        assert not agent.replicas
        await client("POST", "/admin/nodes/n1/uncordon")
        await until(lambda: agent.replicas, "the pinned model was started")


async def test_a_second_scheduler_stands_by_and_takes_over(
    tmp_path, agent, registry, session
) -> None:
    second_registry = EmbeddedRegistry(tmp_path / "registry.db")
    async with contextlib.AsyncExitStack() as both:
        both.push_async_callback(second_registry.close)
        async with scheduler(tmp_path, registry) as first_url:
            first = Client(first_url, session)
            await leading(first, agent)
            await first("POST", "/admin/models", A)
            second_url = await both.enter_async_context(scheduler(tmp_path, second_registry))
            second = Client(second_url, session)
            status, body = await second("GET", "/admin/models")
            assert (status, body["error"]["leader"]) == (503, first_url)
            assert (await second("GET", "/readyz"))[0] == 503
        await leading(second, agent)  # the first one left
        _, listed = await second("GET", "/admin/models")
        assert [model["name"] for model in listed["models"]] == ["a"]
        assert (await second("GET", "/healthz"))[1]["term"] == 2


async def test_a_quarantine_survives_a_restart_and_is_released_once(
    tmp_path, agent, registry, session
) -> None:
    device = "/admin/nodes/n1/devices/g0"
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        assert (await client("POST", f"{device}/release"))[0] == 409
        assert (await client("POST", "/admin/nodes/n1/devices/g9/quarantine"))[0] == 404
        status, _ = await client("POST", f"{device}/quarantine", {"reason": "smells of smoke"})
        assert status == 200

        async def kept() -> bool:
            return bool((await registry.list("stoker/quarantine/"))[0])

        for _ in range(200):
            if await kept():
                break
            await asyncio.sleep(0.02)
        assert await kept()
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        await client.beat(agent)
        _, devices = await client("GET", "/admin/devices")
        assert devices["devices"][0]["quarantined"] == "smells of smoke"
        _, saved = await client("POST", "/admin/models", A)
        assert "no healthy device" in saved["model"]["problem"]
        _, metrics = await client("GET", "/metrics")
        assert 'stoker_device_quarantined{device="g0",node="n1"} 1.0' in metrics
        assert (await client("POST", f"{device}/release"))[0] == 200
        await client.demand(1, a=1)
        await until(lambda: agent.replicas, "the released device is used")


async def test_a_leader_of_a_new_registry_outranks_the_one_its_agents_remember(
    tmp_path, agent, registry, session
) -> None:
    agent.epoch = 7  # its registry was lost, and with it the term
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)

        async def term() -> int:
            return (await client("GET", "/healthz"))[1]["term"]

        for _ in range(400):
            with contextlib.suppress(AssertionError):
                await client.beat(agent)
            if await term() > 7:
                break
            await asyncio.sleep(0.05)
        assert await term() == 8
        await leading(client, agent)
        await client("POST", "/admin/models", A)
        await client.demand(1, a=1)
        await until(lambda: agent.replicas, "the agent was told to start")
        assert next(iter(agent.replicas.values())).epoch == 8


class FullDisk(EmbeddedRegistry):
    """Can be read; whatever is written fails."""

    async def acquire(self, *_: object, **__: object) -> None:
        raise RegistryError("cannot put leader: database or disk is full")


async def test_a_scheduler_that_can_not_lead_says_what_it_fails_of(tmp_path) -> None:
    registry = FullDisk(tmp_path / "registry.db")
    async with (
        scheduler(tmp_path, registry) as url,
        aiohttp.ClientSession() as session,
        asyncio.timeout(60),
    ):
        client = Client(url, session)
        status, body = await client("GET", "/admin/models")
        while "disk is full" not in body["error"]["message"]:
            assert (status, body["error"]["message"]) == (503, "this scheduler is not the leader")
            await asyncio.sleep(0.05)
            status, body = await client("GET", "/admin/models")
        assert status == 503
        assert body["error"]["message"] == (
            "this scheduler is not the leader: the registry does not answer: cannot put leader:"
            " database or disk is full"
        )
    await registry.close()
