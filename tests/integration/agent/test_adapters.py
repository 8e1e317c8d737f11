"""LoRA adapters on one node: pulled beside a start, told by heartbeats, held, slept over."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from runtime.checkpoints.model_files import CacheView
from runtime.wire.agent_messages import Inspection, SleepReplica, WakeReplica
from tests.kits.agent_process import (
    TOKEN,
    bearer,
    spec,
    start,
    stop,
    until,
)
from tests.kits.fake_hub import FakeHub
from tests.kits.lora_adapter import write_adapter

QUICK = {"start_s": 0.0, "ttft_s": 0.0, "sleep_s": 0.0, "wake_1_s": 0.0, "wake_2_s": 0.0}
SQL = "hf:org/sql"


class Hub(FakeHub):
    """Gives no weights while `shut`."""

    def __init__(self) -> None:
        super().__init__()
        self.open_door = asyncio.Event()
        self.before_bytes = self._wait

    async def _wait(self, path):
        if path.endswith(".safetensors"):
            await self.open_door.wait()
        return


@pytest.fixture
async def hub(tmp_path):
    hub = Hub()
    await hub.open()
    folder = write_adapter(tmp_path / "sql")
    hub.add("org/sql", {file.name: file.read_bytes() for file in folder.iterdir()})
    yield hub
    hub.open_door.set()
    await hub.close()


@pytest.fixture
def agent_env(hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}


def model(**adapters):
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    return msgspec.structs.replace(spec(**QUICK, **lora), adapters=adapters)


async def ask(client, report, name):
    """(status, answer) as a router would get them."""
    body = {"model": name, "prompt": "one two three", "max_tokens": 2}
    async with client.session.post(
        f"{report.base_url}/v1/completions", json=body, headers=bearer(report.key)
    ) as reply:
        return reply.status, await reply.json()


async def text(client, report, name):
    status, answer = await ask(client, report, name)
    assert (status, answer["model"]) == (200, name)
    return answer["choices"][0]["text"]


async def cached(client, node):
    async with client.session.get(f"{node.url}/agent/cache", headers=bearer(TOKEN)) as got:
        return msgspec.json.decode(await got.read(), type=CacheView).models


async def test_the_base_serves_while_an_adapter_is_pulled_and_its_requests_wait(
    launch, scheduler, client, hub
):
    node = await launch()
    await client.ok(node.url, start(model=model(sql=SQL)))
    ready = await scheduler.phase("ready")
    asked = asyncio.create_task(text(client, ready, "m:sql"))
    assert await text(client, ready, "m") == "one two"
    assert not asked.done()
    hub.open_door.set()
    assert await asked == "one two"
    (held,) = await cached(client, node)
    assert (held.model, held.held_by) == ("hf:org/sql@main", ("m:sql",))

    await client.ok(node.url, stop())
    await scheduler.phase(None)
    (left,) = await cached(client, node)
    assert left.held_by == ()


async def test_heartbeats_tell_of_adapters_and_an_agent_that_was_killed_knows_them(
    launch, scheduler, client, hub, tmp_path
):
    hub.open_door.set()
    first, second = (str(write_adapter(tmp_path / name)) for name in ("first", "second"))
    node = await launch()
    await client.ok(node.url, start(model=model(first=first)))
    ready = await scheduler.phase("ready")
    assert await text(client, ready, "m:first") == "one two"
    scheduler.adapters = {"m": {"second": second, "sql": SQL}, "elsewhere": {"x": "/x"}}
    assert await text(client, ready, "m:second") == "one two"
    assert await text(client, ready, "m:sql") == "one two"
    url = f"{ready.base_url}/v1/models"

    async def loaded():
        async with client.session.get(url, headers=bearer(ready.key)) as got:
            return {card["id"] for card in (await got.json())["data"] if card.get("parent")}

    while "m:first" in await loaded():
        await asyncio.sleep(0.05)
    assert await loaded() == {"m:second", "m:sql"}

    await node.kill()
    scheduler.adapters = {}  # it says nothing of the model yet
    scheduler.heartbeats.clear()
    successor = await launch()
    again = await scheduler.phase("ready")
    assert again.pid == ready.pid
    await until(lambda: len(scheduler.heartbeats) > 5, "the new agent to look around")
    assert await loaded() == {"m:second", "m:sql"}, "nothing was unloaded for not being known yet"
    (held,) = await cached(client, successor)
    assert held.held_by == ("m:sql",)
    scheduler.adapters = {"m": {}}
    while await loaded():
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("level", [1, 2])
async def test_an_adapter_answers_after_its_engine_slept(
    launch, scheduler, client, tmp_path, level
):
    node = await launch()
    folder = str(write_adapter(tmp_path / "a"))
    await client.ok(node.url, start(model=model(a=folder)))
    ready = await scheduler.phase("ready")
    assert await text(client, ready, "m:a") == "one two"
    about: dict[str, Any] = {"replica_id": "m-1", "epoch": 1, "reason": "a test wants it"}
    await client.ok(node.url, SleepReplica(level=level, grace_s=20.0, **about))
    await scheduler.phase("asleep")
    await client.ok(node.url, WakeReplica(**about))
    woken = await scheduler.phase("ready")
    assert woken.disabled == {}
    assert await text(client, woken, "m:a") == "one two"
    assert await text(client, woken, "m") == "one two"


async def test_an_inspection_pulls_an_adapter_to_read_its_rank(launch, client, hub):
    node = await launch()
    hub.open_door.set()
    asked = msgspec.structs.replace(spec(), adapters={"sql": SQL, "none": "hf:org/none"})
    async with client.session.post(
        f"{node.url}/agent/inspect",
        data=msgspec.json.encode(asked),
        headers=bearer(TOKEN),
    ) as got:
        found = msgspec.json.decode(await got.read(), type=Inspection)
    assert found.lora_rank == 8
    (problem,) = found.problems
    assert problem.field == "adapters.none"


async def test_an_inspection_for_a_plan_pulls_nothing(launch, client, hub):
    """An operator may ask what would happen, not have every node fetch what they name."""
    node = await launch()
    asked_before = list(hub.calls)
    asked = msgspec.structs.replace(spec(), adapters={"sql": SQL, "none": "hf:org/none"})

    async def inspect(fetch: int) -> Inspection:
        async with client.session.post(
            f"{node.url}/agent/inspect?fetch={fetch}",
            data=msgspec.json.encode(asked),
            headers=bearer(TOKEN),
        ) as got:
            return msgspec.json.decode(await got.read(), type=Inspection)

    found = await inspect(0)
    assert (found.problems, found.lora_rank) == ((), 0)
    assert hub.calls == asked_before
    async with client.session.get(f"{node.url}/agent/cache", headers=bearer(TOKEN)) as got:
        assert msgspec.json.decode(await got.read(), type=CacheView).pulls == ()
    hub.open_door.set()
    await inspect(1)
    assert (await inspect(0)).lora_rank == 8, "what is here is read"


async def test_an_inspection_for_a_plan_tells_no_folder_elsewhere_from_none(
    launch, client, tmp_path
):
    """What an operator may ask about, nobody has declared: the host's folders are no model's."""
    node = await launch()
    write_adapter(tmp_path / "elsewhere")

    async def told(source: str, fetch: int) -> bytes:
        asked = msgspec.structs.replace(
            spec(), engine="vllm", engine_args={}, source=source, adapters={"sql": source}
        )
        async with client.session.post(
            f"{node.url}/agent/inspect?fetch={fetch}",
            data=msgspec.json.encode(asked),
            headers=bearer(TOKEN),
        ) as got:
            return (await got.read()).replace(source.encode(), b"SOURCE")

    there, missing = f"{tmp_path}/elsewhere", f"{tmp_path}/none"
    assert await told(there, 0) == await told(missing, 0)
    assert b"only for a model that is declared" in await told(there, 0)
    assert await told(there, 1) != await told(missing, 1)
