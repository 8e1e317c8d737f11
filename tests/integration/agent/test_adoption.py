"""Engines outlive their agent and are adopted by the next one, unless it was told to end them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import aiohttp
import pytest

from agent.engines.process import Owner
from tests.kits.agent_process import (
    NODE,
    AgentProcess,
    alive,
    make_config,
    processes,
    spec,
    start,
    stop,
    until,
)
from tests.kits.port_ranges import free_range


async def test_an_engine_outlives_its_agent_and_is_adopted(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    boot_id = scheduler.heartbeats[-1].boot_id
    await node.kill()
    assert await client.complete(first) == 2
    scheduler.heartbeats.clear()

    successor = await launch()
    adopted = await scheduler.phase("ready")
    assert (adopted.pid, adopted.base_url, adopted.key) == (first.pid, first.base_url, first.key)
    assert adopted.start_s == first.start_s
    assert scheduler.phases() == ["ready"]
    assert scheduler.heartbeats[-1].boot_id > boot_id
    await client.ok(successor.url, stop())
    await scheduler.phase(None)
    assert not alive(first.pid)


async def test_an_adopted_engine_that_dies_is_restarted(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    await node.kill()
    await launch()
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: scheduler.report().restarts == 1, "a restart")
    await scheduler.phase("ready")


async def test_an_engine_that_is_still_starting_is_adopted(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start(model=spec(start_s=2.0)))
    first = await until(lambda: (r := scheduler.report()) and r.pid and r, "its pid")
    os.kill(first.pid, signal.SIGSTOP)  # it starts for as long as the next agent needs to come
    await node.kill()
    scheduler.heartbeats.clear()
    await launch()
    await scheduler.phase("starting")
    os.kill(first.pid, signal.SIGCONT)
    ready = await scheduler.phase("ready")
    assert (ready.pid, ready.restarts) == (first.pid, 0)
    assert scheduler.phases() == ["starting", "ready"]
    assert ready.start_s >= 2.0


async def test_an_engine_that_died_while_no_agent_ran_is_restarted(launch, scheduler, client):
    node = await launch(env={"STOKER_TEST_FAMILY": "1"})
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    family = processes(node.config)["m-1"]
    await node.kill()
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: not alive(first.pid), "its death")
    scheduler.heartbeats.clear()
    await launch()
    ready = await scheduler.phase("ready")
    assert ready.restarts == 1
    died = next(r for h in scheduler.heartbeats for r in h.replicas if r.phase == "backoff")
    assert "no agent ran" in died.reason
    assert not any(map(alive, family)), "its child must have been killed first"


async def test_processes_of_an_unknown_replica_are_killed(launch, tmp_path, scheduler):
    config = make_config(tmp_path)
    marks = Owner(config.node_id(), config.state_dir).marks("m-of-old")
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, **marks},
        start_new_session=True,
    )
    try:
        await until(lambda: processes(config), "the orphan")
        await launch()
        await until(lambda: orphan.poll() is not None, "the orphan's end")
        assert orphan.returncode == -signal.SIGKILL
    finally:
        orphan.kill()
        orphan.wait()


async def test_two_agents_do_not_share_a_state_dir(launch, tmp_path):
    await launch()
    second = AgentProcess(make_config(tmp_path), tmp_path)
    try:
        assert await second.ended() == 1
        assert "another agent runs" in (tmp_path / "agent.log").read_text()
    finally:
        second.close()


# ------------------------------------------------------------------------------ the end


async def test_sigterm_drains_and_leaves_no_process(launch, scheduler, client, registry):
    node = await launch(env={"STOKER_TEST_FAMILY": "1"})
    await client.ok(node.url, start("m-1", model=spec(start_s=0.0, token_s=0.05)))
    await client.ok(node.url, start("m-2", devices=(f"simulated:{NODE}:1",)))
    ready = await scheduler.phase("ready")
    await scheduler.phase("ready", "m-2")
    family = set().union(*processes(node.config).values())
    request = asyncio.create_task(client.complete(ready, max_tokens=40))
    await until(lambda: scheduler.report().in_flight == 1, "the request to be in flight")
    assert await node.kill(signal.SIGTERM) == 0
    assert await request == 40
    assert processes(node.config) == {}
    assert not any(map(alive, family))
    last = scheduler.heartbeats[-1]
    assert (last.draining, last.replicas) == (True, ())
    assert any(h.draining and h.replicas for h in scheduler.heartbeats)
    assert (await registry.services("stoker-agent"))[0] == ()


async def test_a_second_sigterm_waits_for_nothing(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start(model=spec(start_s=0.0, token_s=1.0)))
    ready = await scheduler.phase("ready")
    request = asyncio.create_task(client.complete(ready, max_tokens=1000))
    await until(lambda: scheduler.report().in_flight == 1, "the request to be in flight")
    node.popen.send_signal(signal.SIGTERM)
    await scheduler.phase("draining")
    assert await node.kill(signal.SIGTERM) == 0
    assert processes(node.config) == {}
    with pytest.raises(aiohttp.ClientError):
        await request


async def test_sigusr1_leaves_the_engines_to_the_next_agent(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    assert await node.kill(signal.SIGUSR1) == 0
    assert await client.complete(first) == 2
    scheduler.heartbeats.clear()
    await launch()
    assert (await scheduler.phase("ready")).pid == first.pid


async def test_engines_listen_in_their_range_and_never_where_an_adopted_one_does(
    launch, scheduler, client
):
    allowed = free_range(2)
    setting = {
        "engine_ports": f"{allowed[0]}-{allowed[-1]}",
        "devices": "simulated:3x24GiB",
        "max_restarts": 30,  # so that the third one is tried until there is room
    }

    def begin(number, **engine_args):
        device = f"simulated:{NODE}:{number}"
        return start(f"m-{number}", devices=(device,), model=spec(**engine_args))

    def port_of(number):
        return urlsplit(scheduler.report(f"m-{number}").base_url).port

    node = await launch(**setting)
    await client.ok(node.url, begin(0, start_s=60.0))
    await scheduler.phase("starting", "m-0")
    await until(lambda: scheduler.report("m-0").base_url, "its process")
    first = port_of(0)
    assert first in allowed
    await node.kill()
    scheduler.heartbeats.clear()

    node = await launch(**setting)
    await client.ok(node.url, begin(1, start_s=0.0))
    await scheduler.phase("ready", "m-1")
    assert {first, port_of(1)} == set(allowed)

    await client.ok(node.url, begin(2, start_s=0.0))
    told = await scheduler.phase("backoff", "m-2")
    assert told.exit_kind == "port_in_use"
    assert f"no port of agent.engine_ports = '{setting['engine_ports']}' is free" in told.reason
    await client.ok(node.url, stop("m-0"))
    await scheduler.phase("ready", "m-2")
    assert port_of(2) == first


async def test_records_hold_keys_so_only_the_owner_reads_them(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    told = await scheduler.phase("ready")
    (file,) = (node.config.registry_file().parent / "replicas").glob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["route_key"] == told.key
