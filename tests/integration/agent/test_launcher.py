"""The launcher with real processes: what is forked equals what is started, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import aiohttp
import psutil
import pytest

import agent.engines.launcher
from agent.engines import process
from agent.engines.launcher import ENOUGH_BYTES, SHORT_BYTES, CannotFork, Launcher
from agent.engines.ports import free_port
from agent.engines.process import Owner
from agent.engines.supervisor import Supervisor
from runtime.engine.contract import Launch, LaunchContext, Preload
from runtime.engine.select import get_engine
from runtime.registry.embedded import EmbeddedRegistry
from runtime.wire.model_spec import ModelSpec
from tests.kits.agent_process import (
    TOKEN,
    AgentProcess,
    Client,
    FakeScheduler,
    bearer,
    kill_all,
    make_config,
    start,
)
from tests.kits.checkout import ROOT

DEADLINE_S = 30.0
FORK_REPORT = "tests.kits.fork_report"


async def until(condition, what: str):
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        await asyncio.sleep(0.01)
    return value


class World:
    """A supervisor and a launcher, put together as a node does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exits: list[tuple[str, int | None]] = []
        self.owner = Owner("node", str(folder))
        self.supervisor = Supervisor(
            self.owner, folder / "logs", lambda *ended: self.exits.append(ended)
        )
        base = process.base_environment(os.environ)
        self.launcher = Launcher(folder / "logs", base, folder)

    def launch(self, *argv: str, preload: str = "runtime.engine.stub.server", **env: str) -> Launch:
        shared = {"PYTHONPATH": f"{ROOT}:{self.folder}", **env}
        return Launch(
            argv=(sys.executable, "-m", *argv), env={**shared, "OWN": "1"}, health_path="/health",
            preload=Preload(module=preload, python=sys.executable, env=shared),
        )  # fmt: skip

    async def held(self, replica_id, launch):
        env = self.supervisor.environment(replica_id, launch.env)
        with self.supervisor.open_log(replica_id) as output:
            return await self.launcher.fork(launch, env, output.fileno())

    async def fork(self, replica_id, launch):
        return self.supervisor.release(replica_id, await self.held(replica_id, launch))

    def plain(self, replica_id, launch):
        return self.supervisor.spawn(replica_id, launch.argv, launch.env, self.folder)

    async def report(self, name):
        file = self.folder / name
        await until(file.exists, f"the report {name}")
        return json.loads(file.read_text())

    def reporting(self, name, then="wait", **options):
        return self.launch(FORK_REPORT, str(self.folder / name), then, **options)

    async def parent(self) -> int:
        await until(lambda: self.launcher.ready, "a launcher")
        (pid,) = self.launcher.pids()
        return pid


@pytest.fixture
async def world(tmp_path):
    world = World(tmp_path)
    yield world
    await world.launcher.close()
    for replica_id in await world.supervisor.trees():
        await world.supervisor.kill_tree(replica_id)
    world.supervisor.close()


async def test_a_forked_process_sees_what_a_plain_one_sees(world):
    (world.folder / "tmp").mkdir()
    launch = {"TMPDIR": str(world.folder / "tmp"), "OMP_NUM_THREADS": "3"}
    world.plain("r", world.reporting("plain", **launch))
    plain = await world.report("plain")
    world.supervisor.forget("r")
    await world.fork("r", world.reporting("forked", **launch))
    forked = await world.report("forked")
    for name, report in (("plain", plain), ("forked", forked)):
        assert report["argv"].pop(1) == str(world.folder / name)
        report["proc_environ"].sort()
    for name in ("unlike", "authkey"):
        assert plain.pop(name) != forked.pop(name)
    assert forked == plain
    assert forked["leads_session"]
    assert forked["tempdir"] == launch["TMPDIR"]
    assert "said on stdout\nsaid on stderr" in world.supervisor.log_tail("r")


async def test_two_forked_processes_share_no_secret_and_no_random_state(world):
    await world.fork("r1", world.reporting("one"))
    await world.fork("r2", world.reporting("two"))
    one, two = await world.report("one"), await world.report("two")
    assert one["authkey"] != two["authkey"]
    assert one["unlike"] != two["unlike"]


async def test_it_is_found_by_its_marks_its_session_and_its_command_line(world):
    leader = await world.fork("r", world.reporting("one"))
    await world.report("one")
    assert process.scan(world.owner, {}) == {"r": {leader.pid}}
    assert (await world.supervisor.trees())["r"] == {leader.pid}
    assert "fork_report" in " ".join(psutil.Process(leader.pid).cmdline())
    assert leader.start == process.start_ticks(leader.pid)


@pytest.mark.parametrize("status", [0, 7])
async def test_its_exit_status_is_told(world, status):
    await world.fork("r", world.reporting("one", str(status)))
    await until(lambda: world.exits, "the exit")
    assert world.exits == [("r", status)]


async def test_its_threads_end_and_its_last_words_are_heard_as_of_a_plain_one(world):
    tails = []
    for replica_id in ("plain", "forked"):
        launch = world.reporting(replica_id, "late")
        if replica_id == "plain":
            world.plain(replica_id, launch)
        else:
            await world.fork(replica_id, launch)
        await until(lambda: world.exits, "the exit")
        assert world.exits == [(replica_id, 1)]
        world.exits.clear()
        tails.append(world.supervisor.log_tail(replica_id))
    assert tails[0] == tails[1]
    for words in ("why it ended", "from a thread that is no daemon", "last words"):
        assert words in tails[1]


async def test_the_signal_that_killed_it_is_told_and_no_zombie_is_left(world):
    leader = await world.fork("r", world.reporting("one"))
    await world.report("one")
    await world.supervisor.kill_tree("r")
    assert world.exits == [("r", -signal.SIGKILL)]
    await until(lambda: not psutil.pid_exists(leader.pid), "the zombie to be reaped")


async def test_the_stub_engine_serves_when_forked(world):
    port = free_port("127.0.0.1", ())
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=port, route_key="route", control_key="control",
        device_kind="simulated", device_ids=("s",), device_indexes=(0,), device_bytes=1,
        device_total_bytes=1, model_path="x", revision=None, python=sys.executable, cache_dir="x",
    )  # fmt: skip
    spec = ModelSpec(name="m", source="x", engine="stub", engine_args={"start_s": 0.0})
    plan = get_engine("stub").launch(spec, ctx)
    launch = world.launch(*plan.argv[2:])
    leader = await world.fork("r", Launch(**{**_fields(launch), "env": launch.env | plan.env}))
    body = {"model": "m", "prompt": "one two", "max_tokens": 2}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        await until(lambda: world.supervisor.log_tail("r") or alive(leader.pid), "its process")
        answer = await eventually(
            lambda: http.post(
                "/v1/completions", json=body, headers={"Authorization": "Bearer route"}
            )
        )
    assert answer["usage"]["completion_tokens"] == 2
    world.supervisor.terminate("r")
    await until(lambda: world.exits, "the exit")
    assert world.exits == [("r", 0)]


def _fields(launch):
    return {name: getattr(launch, name) for name in launch.__struct_fields__}


async def eventually(request):
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with request() as got:
                if got.status == 200:
                    return await got.json()
        assert time.monotonic() < deadline, "the engine never answered"
        await asyncio.sleep(0.02)


def alive(pid):
    return process.start_ticks(pid) is not None


async def test_one_that_is_dropped_never_runs(world):
    held = await world.held("r", world.reporting("one"))
    assert alive(held.pid)
    held.drop()
    await until(lambda: not alive(held.pid), "its end")
    assert not (world.folder / "one").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True)"
         ".start()", "2 threads"),
        ("raise ImportError('no such engine')", "no such engine"),
        ("from runtime.engine.fork_server import ForkRefused\nraise ForkRefused('version 9')",
         "version 9"),
    ],
)  # fmt: skip
async def test_an_engine_that_is_not_safe_to_fork_is_refused_with_words(world, code, words):
    (world.folder / "unsafe.py").write_text(code)
    with pytest.raises(CannotFork, match=words) as refused:
        await world.fork("r", world.reporting("one", preload="unsafe"))
    assert refused.value.why == "unsafe"
    assert world.supervisor.leaders() == {}


async def test_a_thread_that_came_later_is_seen_at_the_fork(world):
    (world.folder / "later.py").write_text(
        "import os, threading, time\n"
        "import runtime.engine.fork_server as f\n"
        "real = f.environment_stamp\n"
        "def late():\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "    f.environment_stamp = real\n"
        "    return real()\n"
        "def first():\n"
        "    f.environment_stamp = late\n"
        "    return real()\n"
        "f.environment_stamp = first\n"
    )
    with pytest.raises(CannotFork, match="2 threads"):
        await world.fork("r", world.reporting("one", preload="later"))


async def test_too_large_an_environment_is_refused(world):
    launch = world.reporting("one")
    launch.env["HUGE"] = "x" * 120_000
    with pytest.raises(CannotFork, match="an environment of"):
        await world.held("r", launch)


async def test_a_parent_that_dies_is_replaced_and_its_children_live_on(world):
    leader = await world.fork("r", world.reporting("one"))
    await world.report("one")
    first = await world.parent()
    os.kill(first, signal.SIGKILL)
    await until(lambda: world.launcher.pids() - {first} and world.launcher.ready, "another one")
    assert alive(leader.pid)
    await world.fork("r2", world.reporting("two", "0"))
    await until(lambda: world.exits, "the second one's end")
    await world.supervisor.kill_tree("r")
    assert world.exits == [("r2", 0), ("r", None)]


async def test_parents_end_with_the_agent_and_children_do_not(world):
    leader = await world.fork("r", world.reporting("one"))
    await world.report("one")
    parent = await world.parent()
    await world.launcher.close()
    assert not alive(parent)
    assert alive(leader.pid)


async def test_a_parent_ends_when_its_agent_just_vanishes(tmp_path):
    code = f"""
import asyncio, os
from pathlib import Path
from tests.integration.agent.test_launcher import World
async def main():
    world = World(Path({str(tmp_path)!r}))
    world.launcher.prepare(world.reporting("x").preload)
    print(await world.parent(), flush=True)
    os._exit(9)
asyncio.run(main())
"""
    agent_process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    out, _ = await agent_process.communicate()
    await until(lambda: not alive(int(out)), "the launcher's end")


async def test_packages_that_change_make_a_new_parent(world, monkeypatch):
    monkeypatch.setattr(agent.engines.launcher, "_SETTLED_S", 0.05)
    base = {"PYTHONUSERBASE": str(world.folder / "user")}
    packages = world.folder / "user/lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    await world.fork("r1", world.reporting("one", "0", **base))
    first = await world.parent()
    (packages / "vllm-99.dist-info").mkdir()
    with pytest.raises(CannotFork, match="packages were installed"):
        await world.fork("r2", world.reporting("two", **base))

    def renewed():
        world.launcher.keep(ENOUGH_BYTES + 1)
        return world.launcher.pids() - {first} and world.launcher.ready

    await until(renewed, "another one")
    await world.fork("r3", world.reporting("three", "0", **base))
    await world.report("three")


async def test_without_host_memory_there_is_no_parent(world):
    launch = world.reporting("one", "0")
    world.launcher.prepare(launch.preload)
    parent = await world.parent()
    world.launcher.keep(SHORT_BYTES - 1)
    await until(lambda: not alive(parent), "the parent's end")
    with pytest.raises(CannotFork, match="memory is short") as refused:
        await world.fork("r", launch)
    assert refused.value.why == "memory"
    world.launcher.keep(SHORT_BYTES + 1)  # not enough to try again
    assert world.launcher.pids() == set()
    world.launcher.keep(ENOUGH_BYTES + 1)
    await world.fork("r", launch)
    await world.report("one")


async def test_an_engine_environment_has_one_parent_and_no_more_than_two_are_kept(world):
    for name, value in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "3")):
        await world.fork(name, world.reporting(name, "0", KIND=value))
        report = await world.report(name)
        assert report["environ"]["KIND"] == value
    assert len(world.launcher.pids()) == 2


async def test_the_agent_counts_how_each_engine_was_started_and_why_plainly(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "state").mkdir()
    registry, scheduler = EmbeddedRegistry(config.registry_file()), FakeScheduler()
    await scheduler.open()
    await scheduler.lead(registry)
    node = AgentProcess(config, tmp_path)
    try:
        await node.ready()
        async with aiohttp.ClientSession() as session:
            await Client(session).ok(node.url, start())
            await scheduler.phase("ready")
            async with session.get(f"{node.url}/metrics", headers=bearer(TOKEN)) as reply:
                metrics = await reply.text()
        assert 'stoker_agent_starts_total{how="plain",model="m",why="engine"} 1.0' in metrics
    finally:
        node.close()
        kill_all(config)
        await scheduler.close()
        await registry.close()
