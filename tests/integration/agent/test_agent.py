"""The node agent with real processes: it runs as a process of its own, its engines are stubs."""

from __future__ import annotations

import asyncio

import msgspec
import psutil
import pytest

from agent.driver import run_agent
from runtime import outside
from runtime.wire.agent_messages import Inspection
from tests.kits.agent_process import (
    DEVICE,
    NODE,
    SCRAPER,
    TOKEN,
    FakeScheduler,
    alive,
    bearer,
    cgroups,
    make_config,
    processes,
    spec,
    start,
    stop,
    until,
)
from tests.kits.bearer_headers import cases, status_of

# ------------------------------------------------------------------------------ start and stop


async def test_a_start_becomes_a_ready_replica_in_heartbeats(launch, scheduler, client, registry):
    node = await launch(labels={"zone": "a"})
    reply = await client.ok(node.url, start())
    told = await scheduler.phase("ready")
    assert scheduler.phases() == ["starting", "ready"]

    heartbeat = scheduler.heartbeats[-1]
    assert heartbeat.seq >= reply.seq
    assert heartbeat.boot_id == reply.boot_id
    assert (heartbeat.node_id, heartbeat.address) == (NODE, node.url)
    assert [d.device_id for d in heartbeat.devices] == [DEVICE, f"simulated:{NODE}:1"]
    assert heartbeat.labels == {"zone": "a"}
    assert not heartbeat.draining
    assert heartbeat.host_memory_total_bytes > heartbeat.host_memory_available_bytes > 0
    seqs = [h.seq for h in scheduler.heartbeats]
    assert seqs == sorted(set(seqs))
    await until(lambda: "stub" in scheduler.heartbeats[-1].engines, "the stub's version")

    assert (told.model, told.epoch, told.device_ids) == ("m", 1, (DEVICE,))
    assert told.launch_key == spec(start_s=0.0).launch_key()
    assert told.restarts == 0
    assert told.reason is None
    assert told.start_s > 0
    assert {told.pid} == processes(node.config)["m-1"]
    assert await client.complete(told) == 2
    await until(lambda: scheduler.report().idle_for_s is not None, "the request to be seen")
    async with client.session.get(f"{told.base_url}/v1/models", headers=bearer("guess")) as refused:
        assert refused.status == 401

    services, _ = await registry.services("stoker-agent")
    assert [(s.meta["node_id"], f"http://{s.address}:{s.port}") for s in services] == [
        (NODE, node.url)
    ]


async def test_the_command_is_shown_by_the_heartbeat_its_reply_names(launch, scheduler, client):
    node = await launch()
    reply = await client.ok(node.url, start(model=spec(start_s=60.0)))
    beats = scheduler.heartbeats
    await until(lambda: beats and beats[-1].seq >= reply.seq, "that heartbeat")
    shown = {h.seq: [r.replica_id for r in h.replicas] for h in beats}
    assert all((ids == ["m-1"]) == (seq >= reply.seq) for seq, ids in shown.items())


async def test_repeating_a_start_starts_nothing(launch, scheduler, client):
    node = await launch()
    for _ in range(3):
        await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    await client.ok(node.url, start(epoch=2))
    assert processes(node.config) == {"m-1": {first.pid}}


async def test_stop_lets_what_is_in_flight_end(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start(model=spec(start_s=0.0, token_s=0.05)))
    ready = await scheduler.phase("ready")
    request = asyncio.create_task(client.complete(ready, max_tokens=40))
    await until(lambda: scheduler.report().in_flight == 1, "the request to be in flight")
    await client.ok(node.url, stop())
    draining = await scheduler.phase("draining")
    assert not request.done()
    assert (draining.in_flight, draining.reason) == (1, "a test is done")
    assert await request == 40
    await scheduler.phase(None)
    assert scheduler.phases() == ["starting", "ready", "draining", "stopping"]
    assert not alive(ready.pid)
    assert list((node.config.registry_file().parent / "replicas").iterdir()) == []


async def test_stop_of_an_unknown_replica_is_success(launch, client):
    node = await launch()
    assert (await client.ok(node.url, stop("never-was"))).ok


async def test_starts_on_one_device_take_turns(launch, scheduler, client):
    node = await launch()
    for n in range(3):
        await client.ok(node.url, start(f"m-{n}", model=spec(start_s=0.3)))
    for n in range(3):
        await scheduler.phase("ready", f"m-{n}")
    starting = [
        sum(r.phase == "starting" and r.pid is not None for r in heartbeat.replicas)
        for heartbeat in scheduler.heartbeats
    ]
    assert max(starting) == 1


async def test_an_older_epoch_is_refused(launch, scheduler, client):
    node = await launch()
    scheduler.term = 9
    seen = len(scheduler.heartbeats)
    await until(lambda: len(scheduler.heartbeats) >= seen + 2, "two heartbeats")
    for command in (start(epoch=8), stop(epoch=8)):
        status, reply = await client.send(node.url, command)
        assert (status, reply.ok) == (409, False)
        assert "epoch 8" in reply.error
    await node.kill()
    successor = await launch()
    status, _ = await client.send(successor.url, start(epoch=8))
    assert status == 409, "the epoch must outlive the agent"


async def test_who_may_call_it(launch, client):
    node = await launch()
    status, _ = await client.send(node.url, start(), token="wrong")
    assert status == 401
    status, words = await client.send(node.url, b'{"type": "dance"}')
    assert status == 400
    assert b"dance" in words
    for path, expected in {"/healthz": 200, "/metrics": 401}.items():
        async with client.session.get(node.url + path) as reply:
            assert reply.status == expected
    for path, expected in {"/metrics": 200, "/agent/cache": 401, "/agent/commands": 401}.items():
        async with client.session.get(node.url + path, headers=bearer(SCRAPER)) as reply:
            assert reply.status == expected, "a scraper's token opens the metrics alone"


async def test_a_token_is_read_as_everywhere(launch):
    node = await launch()
    for path, token in (("/agent/cache", TOKEN), ("/metrics", SCRAPER)):
        for lines, opens in [*cases(token), (f"Authorization: {token}".encode(), False)]:
            assert await status_of(node.url, path, lines) == (200 if opens else 401), (path, lines)


async def test_a_malformed_range_ends_the_agent_with_the_settings_name(tmp_path, registry):
    with pytest.raises(
        ValueError, match=r"agent\.engine_ports: is not a range of ports \(got '9'\)"
    ):
        await run_agent(make_config(tmp_path, engine_ports="9"), registry)


def open_files(agent_process) -> int:
    return psutil.Process(agent_process.popen.pid).num_fds()


async def test_fifty_lives_leak_nothing(launch, scheduler, client):
    """Processes, descriptors, listening ports, records and cgroups, over ten rounds of five."""
    node = await launch(devices="simulated:5x24GiB")

    async def life(replica_id, index):
        device = f"simulated:{NODE}:{index}"
        await client.ok(node.url, start(replica_id, devices=(device,)))
        ready = await scheduler.phase("ready", replica_id)
        await client.ok(node.url, stop(replica_id))
        await scheduler.phase(None, replica_id)
        return ready.pid

    pids = [await life("warm-up", 0)]
    # Idle connections to ended engines are closed in their own time, so compare like with like.
    before = open_files(node)
    for turn in range(10):
        pids += await asyncio.gather(*(life(f"m-{turn}-{i}", i) for i in range(5)))
    assert len(set(pids)) == 51
    assert not any(map(alive, pids))
    assert processes(node.config) == {}
    me = psutil.Process(node.popen.pid)
    assert me.children() == []
    await until(lambda: open_files(node) <= before, f"{before} open files")
    listening = [c for c in me.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) == 1
    state = node.config.registry_file().parent
    assert list((state / "replicas").iterdir()) == []
    assert cgroups(node.config).replica_ids() == []
    assert len(list((state / "logs").glob("*.log"))) <= 51


# ------------------------------------------------------------------------------ who it talks to


async def test_heartbeats_follow_the_leader(launch, scheduler, client, registry):
    node = await launch()
    await until(lambda: scheduler.heartbeats, "a heartbeat")
    other = FakeScheduler()
    other.term = 2
    await other.open()
    try:
        scheduler.refusing = True
        await other.lead(registry)
        await until(lambda: len(other.heartbeats) > 2, "heartbeats to the new leader")
        status, _ = await client.send(node.url, start(epoch=1))
        assert status == 409
        # The old one takes heartbeats again, but its term is over.
        scheduler.refusing = False
        count = len(other.heartbeats)
        await until(lambda: len(other.heartbeats) > count + 2, "more of them")
    finally:
        await other.close()


async def test_logs_are_served_and_followed(launch, scheduler, client):
    node = await launch(max_restarts=0)
    await client.ok(node.url, start(model=spec(start_s=1.0, fail_start="crash")))
    url = f"{node.url}/agent/replicas/m-1/logs"
    async with client.session.get(url, params={"follow": "1"}, headers=bearer(TOKEN)) as reply:
        assert reply.status == 200
        text = ""
        while "modelled by the stub" not in text:
            text += (await reply.content.readany()).decode()
        assert text.startswith("--- stoker starts m-1 ---\n")
        await scheduler.phase("failed")
        await client.ok(node.url, stop())
        assert await asyncio.wait_for(reply.content.read(), 10.0) == b""
    async with client.session.get(url, params={"tail": "1"}, headers=bearer(TOKEN)) as reply:
        text = await reply.text()
        assert len(text.splitlines()) == 1
        assert "modelled by the stub" in text
    for replica_id in ("unknown", "..%2Fagent"):
        other = f"{node.url}/agent/replicas/{replica_id}/logs"
        async with client.session.get(other, headers=bearer(TOKEN)) as reply:
            assert reply.status == 404


async def test_a_spec_is_inspected(launch, client):
    node = await launch()

    async def inspect(model) -> Inspection:
        async with client.session.post(
            f"{node.url}/agent/inspect", data=msgspec.json.encode(model), headers=bearer(TOKEN)
        ) as reply:
            assert reply.status == 200
            return outside.decode(await reply.read(), Inspection)

    good = await inspect(spec(start_s=1.0))
    assert good.problems == ()
    assert good.checked_against.startswith("stub")
    assert good.estimate is None
    assert good.estimate_error
    bad = await inspect(spec(start_minutes=1))
    assert "start_minutes" in str(bad.problems[0])


async def test_without_a_token_it_listens_on_loopback_only(tmp_path, registry):
    config = make_config(tmp_path, host="0.0.0.0")
    config = type(config)(state_dir=config.state_dir, agent=config.agent)
    with pytest.raises(ValueError, match="cluster_token"):
        await run_agent(config, registry)
