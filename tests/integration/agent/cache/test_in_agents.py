"""The model cache inside real agents: its API, pulls between them, replicas that hold models."""

from __future__ import annotations

import os
from hashlib import sha256

import aiohttp
import msgspec
import pytest

from runtime.checkpoints.model_files import CacheView, VerifyReport
from runtime.contract.config import RegistryConfig
from runtime.registry.embedded import EmbeddedRegistry
from tests.kits.agent_process import (
    DEVICE,
    TOKEN,
    AgentProcess,
    Client,
    FakeScheduler,
    bearer,
    kill_all,
    make_config,
    spec,
    start,
    stop,
    until,
)
from tests.kits.fake_hub import FakeHub

MODEL = "hf:org/m"
FILES = {"config.json": b"not json", "model.safetensors": os.urandom(2_000_000)}


@pytest.fixture
async def hub():
    hub = FakeHub()
    await hub.open()
    hub.add("org/m", FILES)
    yield hub
    await hub.close()


class World:
    """Agents of one registry."""

    def __init__(self, folder, hub, session, registry) -> None:
        self.agents: list[AgentProcess] = []
        self._folder, self._hub, self._session = folder, hub, session
        self._registry = registry

    async def agent(self, name="one", **env) -> AgentProcess:
        folder = self._folder / name
        folder.mkdir()
        config = make_config(folder, node_id=name, devices="simulated:2x24GiB", launcher=False)
        registry = RegistryConfig(file=str(self._registry))
        config = msgspec.structs.replace(config, registry=registry)
        env = {"HF_ENDPOINT": self._hub.url, "HF_TOKEN": self._hub.token} | env
        agent = AgentProcess(config, folder, env)
        self.agents.append(agent)
        return await agent.ready()

    async def call(self, agent, method, path="", status=200, token=TOKEN, **options):
        async with self._session.request(
            method, f"{agent.url}/agent/cache{path}", headers=bearer(token), **options
        ) as answer:
            body = await answer.read()
            assert answer.status == status, body
            return body

    async def view(self, agent) -> CacheView:
        return msgspec.json.decode(await self.call(agent, "GET"), type=CacheView)

    async def pulled(self, agent, model=MODEL):
        """Pulls it; the view of the pull that ended."""
        await self.call(agent, "POST", "/pull", 202, json={"model": model})
        while (found := (await self.view(agent)).pulls[0]).state in ("waiting", "pulling"):
            pass
        return found


@pytest.fixture
async def world(tmp_path, hub):
    async with aiohttp.ClientSession() as session:
        world = World(tmp_path, hub, session, tmp_path / "registry.db")
        yield world
    for agent in world.agents:
        agent.close()
        kill_all(agent.config)


async def test_two_agents_ask_the_hub_once(world, hub) -> None:
    one, two = await world.agent("one"), await world.agent("two")
    first = await world.pulled(one)
    assert (first.state, first.origin) == ("ready", f"the hub {hub.url}")
    second = await world.pulled(two)
    assert (second.state, second.origin) == ("ready", f"peer {one.url}")
    assert hub.count("info") == 1
    (model,) = (await world.view(two)).models
    for path, data in FILES.items():
        with open(f"{model.path}/{path}", "rb") as file:
            assert file.read() == data
    await world.call(two, "POST", "/pull", 204, json={"model": MODEL})


async def test_the_api(world) -> None:
    agent = await world.agent()
    await world.call(agent, "GET", status=401, token="wrong")
    await world.call(agent, "GET", "/blobs/" + "0" * 64, status=404)
    missing = await world.call(agent, "DELETE", "?model=hf:org/m", status=404)
    assert b"hf:org/m is not in this node's cache" in missing
    await world.call(agent, "POST", "/pull", 400, json={"model": "hf:a/b/c"})
    await world.call(agent, "POST", "/pull", 400, json={"modell": MODEL})
    await world.pulled(agent)
    report = await world.call(agent, "POST", "/verify?model=hf:org/m")
    assert msgspec.json.decode(report, type=VerifyReport).bad_files == ()
    freed = await world.call(agent, "DELETE", "?model=hf:org/m")
    assert msgspec.json.decode(freed) == {"freed_bytes": sum(map(len, FILES.values()))}
    assert (await world.view(agent)).used_bytes == 0


async def test_ranges_of_a_blob(world) -> None:
    agent = await world.agent()
    await world.pulled(agent)
    (model,) = (await world.view(agent)).models
    assert model.files == 2
    data = FILES["model.safetensors"]
    url = f"{agent.url}/agent/cache/blobs/{sha256(data).hexdigest()}"
    async with aiohttp.ClientSession(headers=bearer(TOKEN)) as session:
        for text, wanted in {
            "bytes=0-9": data[:10],
            "bytes=1999990-": data[-10:],
            "bytes=-5": data[-5:],
            "bytes=1999999-3000000": data[-1:],
        }.items():
            async with session.get(url, headers={"Range": text}) as answer:
                assert (answer.status, await answer.read()) == (206, wanted), text
                assert answer.headers["Content-Range"].endswith("/2000000")
        async with session.get(url) as answer:
            assert (answer.status, await answer.read()) == (200, data)
        async with session.get(url, headers={"Range": "bytes=2000000-"}) as answer:
            assert answer.status == 416
        async with session.get(url, headers={"Range": "bytes=9-1"}) as answer:
            assert answer.status == 416


async def test_a_wrong_token_is_seen_in_the_pull(world, hub) -> None:
    agent = await world.agent(HF_TOKEN="hf_wrong")
    failed = await world.pulled(agent)
    assert (failed.state, failed.error_kind) == ("failed", "unauthorized")
    assert "its token is wrong" in failed.error


async def test_replicas_pull_hold_and_release_their_models(world, hub, tmp_path) -> None:
    scheduler = FakeScheduler()
    await scheduler.open()
    registry = EmbeddedRegistry(tmp_path / "registry.db")
    await scheduler.lead(registry)
    agent = await world.agent()
    async with aiohttp.ClientSession() as session:
        client = Client(session)
        device = DEVICE.replace("test-node", "one")
        model = spec(engine="vllm", source=MODEL)
        # Its config.json is no JSON, so vLLM ends: the replica is tried again, and holds its model.
        await client.ok(agent.url, start("m-1", devices=(device,), model=model))

        async def held() -> tuple[str, ...]:
            return next((m.held_by for m in (await world.view(agent)).models), ())

        while await held() != ("m-1",):
            assert scheduler.report() is None or scheduler.report().phase != "failed"
        refused = await world.call(agent, "DELETE", "?model=hf:org/m", status=409)
        assert b"in use by m-1; unload the model" in refused
        await client.ok(agent.url, stop("m-1"))
        await until(lambda: scheduler.heartbeats and not scheduler.report(), "the end of m-1")
        assert await held() == ()

        gone = spec(engine="vllm", source="hf:org/none")
        await client.ok(agent.url, start("m-2", devices=(device,), model=gone))
        await until(
            lambda: (r := scheduler.report("m-2")) and r.reason and "no org/none" in r.reason,
            "m-2 to fail in words",
        )
        assert scheduler.report("m-2").exit_kind == "bad_model"
    await scheduler.close()
    await registry.close()
