"""The node agent with real processes: it runs as a process of its own, its engines are stubs."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import aiohttp
import msgspec
import psutil
import pytest

import agent.driver
from agent.devices.inventory import open_devices
from agent.driver import run_agent
from agent.engines.process import Owner
from runtime import outside
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import RegistryError
from runtime.wire.agent_messages import Inspection
from tests.kits.agent_process import (
    DEVICE,
    NODE,
    SCRAPER,
    TOKEN,
    AgentProcess,
    Client,
    FakeScheduler,
    alive,
    bearer,
    cgroups,
    kill_all,
    make_config,
    processes,
    spec,
    start,
    stop,
    until,
)
from tests.kits.port_ranges import free_range


@pytest.fixture
async def client():
    async with aiohttp.ClientSession() as session:
        yield Client(session)


@pytest.fixture
async def registry(tmp_path):
    registry = EmbeddedRegistry(make_config(tmp_path).registry_file())
    (tmp_path / "state").mkdir()
    yield registry
    await registry.close()


@pytest.fixture
async def scheduler(registry):
    scheduler = FakeScheduler()
    await scheduler.open()
    await scheduler.lead(registry)
    yield scheduler
    await scheduler.close()


@pytest.fixture
async def launch(tmp_path, scheduler):
    """Starts agents on one state_dir; in the end no process of theirs is left."""
    agents: list[AgentProcess] = []

    async def launch(env=None, **settings) -> AgentProcess:
        agents.append(AgentProcess(make_config(tmp_path, **settings), tmp_path, env))
        return await agents[-1].ready()

    yield launch
    for one in agents:
        one.close()
    kill_all(make_config(tmp_path))
    print((tmp_path / "agent.log").read_text())


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
    for heartbeat in scheduler.heartbeats:
        running = [r for r in heartbeat.replicas if r.phase == "starting" and r.pid]
        assert len(running) <= 1


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


# ------------------------------------------------------------------------------ failures


async def test_a_killed_engine_is_restarted_and_told(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: scheduler.report().restarts == 1, "a restart")
    second = await scheduler.phase("ready")
    assert second.pid != first.pid
    assert second.key != first.key
    died = next(h for h in scheduler.heartbeats for r in h.replicas if r.phase == "backoff")
    assert died.replicas[0].exit_kind == "killed"
    assert await client.complete(second) == 2
    async with client.session.get(f"{node.url}/metrics", headers=bearer(TOKEN)) as reply:
        text = await reply.text()
    assert 'stoker_agent_exits_total{kind="killed",model="m"} 1.0' in text
    assert 'stoker_agent_replicas{phase="ready"} 1.0' in text


async def test_what_a_killed_api_server_leaves_behind_is_killed(launch, scheduler, client):
    node = await launch(env={"STOKER_TEST_FAMILY": "1"})
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    family = processes(node.config)["m-1"]
    assert len(family) == 2
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: scheduler.report().restarts == 1, "a restart")
    assert not any(map(alive, family))
    await scheduler.phase("ready")
    again = processes(node.config)["m-1"]
    assert len(again) == 2
    await client.ok(node.url, stop())
    await scheduler.phase(None)
    assert not any(map(alive, again))


async def test_a_source_that_is_not_there_fails_with_words(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start(model=spec("vllm", "/no/such/model")))
    failed = await scheduler.phase("failed")
    assert failed.exit_kind == "bad_model"
    assert "/no/such/model" in failed.reason
    assert failed.pid is None
    await client.ok(node.url, stop())
    await scheduler.phase(None)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (start(model=spec(start_minutes=3)), "start_minutes"),
        (start(devices=("GPU-elsewhere",)), "GPU-elsewhere"),
    ],
)
async def test_a_start_that_cannot_be_fails_with_words(launch, scheduler, client, command, words):
    node = await launch()
    await client.ok(node.url, command)
    failed = await scheduler.phase("failed")
    assert failed.exit_kind == "bad_argument"
    assert words in failed.reason
    assert processes(node.config) == {}


async def test_an_engine_that_cannot_start_is_given_up_with_its_reason(launch, scheduler, client):
    node = await launch(max_restarts=1)
    await client.ok(node.url, start(model=spec(start_s=0.0, fail_start="oom")))
    failed = await scheduler.phase("failed")
    assert (failed.exit_kind, failed.restarts) == ("oom", 1)
    assert "memory" in failed.reason
    assert scheduler.phases() == ["starting", "backoff", "starting", "failed"]


async def test_a_start_that_takes_too_long_is_ended(launch, scheduler, client):
    node = await launch(start_timeout_s=1.0)
    await client.ok(node.url, start(model=spec(start_s=600.0)))
    failed = await scheduler.phase("failed")
    assert failed.exit_kind == "start_timeout"
    await until(lambda: processes(node.config) == {}, "its process to be gone")


# ------------------------------------------------------------------------------ adoption


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


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed")
async def test_a_host_where_vllm_cannot_compile_says_so_before_the_first_start(
    launch, scheduler, tmp_path
):
    await launch(devices="cpu:6GiB", env={"PATH": "/without/a/compiler"}, launcher=False)
    log = tmp_path / "agent.log"
    await until(
        lambda: "can't here: there is no g++ on the PATH /without/a" in log.read_text(), "it"
    )
    assert "apt-get install g++ python3-dev" in log.read_text()


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


class DownRegistry:
    """A registry that can't be reached until `up`."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.up = False

    def __getattr__(self, name):
        method = getattr(self._inner, name)

        async def call(*args, **kwargs):
            if not self.up:
                raise RegistryError("the registry is down")
            return await method(*args, **kwargs)

        return call


@pytest.fixture
async def in_process(tmp_path, scheduler, registry):
    """Runs the agent in this process, to put a hand on its registry or its devices."""
    stop_it, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    tasks = []

    async def run(registry=registry) -> str:
        config = make_config(tmp_path)
        work = run_agent(config, registry, stop=stop_it, on_ready=ready.set_result)
        tasks.append(asyncio.create_task(work))
        await asyncio.wait([ready, *tasks], return_when=asyncio.FIRST_COMPLETED)
        return ready.result()

    yield run
    stop_it.set()
    try:
        await asyncio.wait_for(asyncio.gather(*tasks), 30.0)
        assert processes(make_config(tmp_path)) == {}
    finally:
        kill_all(make_config(tmp_path))


async def test_a_registry_that_is_down_stops_nothing(in_process, scheduler, client, registry):
    down = DownRegistry(registry)
    url = await in_process(down)
    await client.ok(url, start())
    async with client.session.get(f"{url}/metrics", headers=bearer(TOKEN)) as reply:
        assert reply.status == 200
    assert scheduler.heartbeats == []
    down.up = True
    await scheduler.phase("ready")
    down.up = False
    await client.ok(url, stop())
    await scheduler.phase(None)


async def test_devices_that_hang_do_not_hold_up_heartbeats(
    in_process, scheduler, client, monkeypatch
):
    hang, release = threading.Event(), threading.Event()

    class Hanging:
        def __init__(self, setting, node_id):
            self._inner = open_devices(setting, node_id)
            self.kind = self._inner.kind

        def read(self, pids):
            if hang.is_set():
                release.wait(60.0)
            return self._inner.read(pids)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    monkeypatch.setattr(agent.driver, "open_devices", Hanging)
    url = await in_process()
    await until(lambda: scheduler.heartbeats, "a heartbeat")
    hang.set()
    try:
        await client.ok(url, start())
        await scheduler.phase("ready")
        count = len(scheduler.heartbeats)
        await until(lambda: len(scheduler.heartbeats) > count + 5, "more heartbeats")
        assert all(d.healthy for d in scheduler.heartbeats[-1].devices)
        await until(
            lambda: not any(d.healthy for d in scheduler.heartbeats[-1].devices),
            "the devices to be told unhealthy",
        )
        assert "has not answered" in scheduler.heartbeats[-1].devices[0].unhealthy_reason
    finally:
        release.set()


async def test_without_a_token_it_listens_on_loopback_only(tmp_path, registry):
    config = make_config(tmp_path, host="0.0.0.0")
    config = type(config)(state_dir=config.state_dir, agent=config.agent)
    with pytest.raises(ValueError, match="cluster_token"):
        await run_agent(config, registry)


async def test_records_hold_keys_so_only_the_owner_reads_them(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    told = await scheduler.phase("ready")
    (file,) = (node.config.registry_file().parent / "replicas").glob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["route_key"] == told.key
