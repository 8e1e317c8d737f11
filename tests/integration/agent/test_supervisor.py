"""The supervisor with real processes: trees that scatter, exits, environments, logs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from agent.engines import process
from agent.engines.process import MainProcess, Owner
from agent.engines.supervisor import LOG_LIMIT_BYTES, Supervisor

DEADLINE_S = 20.0

# Writes the pids of its family to argv[1]: itself, a child that ignores SIGTERM, and a child in a
# session of its own.
FAMILY = """
    import json, os, signal, subprocess, sys, time
    stubborn = [sys.executable, "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
    one = subprocess.Popen(stubborn)
    two = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(sys.argv[1] + ".tmp", "w") as file:
        json.dump([os.getpid(), one.pid, two.pid], file)
    os.rename(sys.argv[1] + ".tmp", sys.argv[1])
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    return process.start_ticks(pid) is not None


async def until(condition, what: str):
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        await asyncio.sleep(0.01)
    return value


class Exits(list):
    def __call__(self, replica_id, returncode):
        self.append((replica_id, returncode))


@pytest.fixture
async def world(tmp_path):
    """(supervisor, its exits, a folder); whatever still runs in the end is killed."""
    exits = Exits()
    supervisor = Supervisor(Owner("node", str(tmp_path)), tmp_path / "logs", exits)
    yield supervisor, exits, tmp_path
    for replica_id in await supervisor.trees():
        await supervisor.kill_tree(replica_id)
    for replica_id in list(supervisor.leaders()):
        supervisor.forget(replica_id)
    supervisor.close()


def run(supervisor, replica_id, code, *args, env=None):
    argv = [sys.executable, "-c", textwrap.dedent(code), *args]
    return supervisor.spawn(replica_id, argv, env or {}, Path("/"))


async def family(supervisor, folder, replica_id="r"):
    file = folder / f"{replica_id}.pids"
    run(supervisor, replica_id, FAMILY, str(file))
    await until(file.exists, "the family to start")
    return json.loads(file.read_text())


async def test_an_exit_is_reported_with_its_code_and_leaves_no_zombie(world):
    supervisor, exits, _ = world
    leader = run(supervisor, "r", "raise SystemExit(7)")
    await until(lambda: exits, "the exit")
    assert exits == [("r", 7)]
    assert not psutil.pid_exists(leader.pid)


async def test_a_killed_process_is_reported_by_its_signal(world):
    supervisor, exits, _ = world
    leader = run(supervisor, "r", "import time; time.sleep(600)")
    os.kill(leader.pid, signal.SIGKILL)
    await until(lambda: exits, "the exit")
    assert exits == [("r", -signal.SIGKILL)]


async def test_a_program_that_is_not_there_is_an_oserror(world):
    supervisor, _, _ = world
    with pytest.raises(OSError, match="nowhere"):
        supervisor.spawn("r", ["/nowhere/python"], {}, Path("/"))
    assert supervisor.leaders() == {}


async def test_the_tree_is_found_whole_also_without_its_root(world):
    supervisor, exits, folder = world
    pids = await family(supervisor, folder)
    assert (await supervisor.trees())["r"] == set(pids)
    os.kill(pids[0], signal.SIGKILL)
    await until(lambda: exits, "the exit of the root")
    assert (await supervisor.trees())["r"] == set(pids[1:])
    await supervisor.kill_tree("r")
    assert not any(map(alive, pids))


async def test_marks_alone_find_the_tree(world):
    """Where there is no cgroup, and the main process was another agent's."""
    supervisor, _, folder = world
    pids = await family(supervisor, folder)
    found = process.scan(Owner("node", str(folder)), {})
    assert found == {"r": set(pids)}


async def test_a_process_that_sets_its_title_keeps_its_marks(world):
    """vLLM does, and setproctitle overwrites what /proc shows of it unless told not to."""
    pytest.importorskip("setproctitle", reason="setproctitle (it comes with vLLM) is not installed")
    supervisor, _, folder = world
    code = """
        import setproctitle, time
        setproctitle.setproctitle("VLLM::EngineCore" + "x" * 3000)
        print("titled", flush=True)
        time.sleep(600)
    """
    leader = run(supervisor, "r", code)
    await until(lambda: "titled" in supervisor.log_tail("r"), "the title")
    assert process.scan(Owner("node", str(folder)), {}) == {"r": {leader.pid}}


async def test_the_cgroup_finds_what_hides_from_all_else(world):
    supervisor, exits, folder = world
    try:
        process.Cgroups.open(Owner("probe", "")).close()
    except OSError as error:
        pytest.skip(f"no cgroup of its own for a replica: {error}")
    code = """
        import os, subprocess, sys, time
        while "stoker-" not in open("/proc/self/cgroup").read():
            time.sleep(0.01)
        hidden = subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)
        print(hidden.pid, flush=True)
    """
    run(supervisor, "r", code)
    await until(lambda: exits, "the exit of the root")
    hidden = int(supervisor.log_tail("r"))
    assert process.scan(Owner("node", str(folder)), {}) == {}
    assert (await supervisor.trees())["r"] == {hidden}
    await supervisor.kill_tree("r")
    assert not alive(hidden)


async def test_another_agents_processes_are_not_ours(world):
    supervisor, _, folder = world
    await family(supervisor, folder)
    for owner in (Owner("other", str(folder)), Owner("node", "/elsewhere")):
        assert process.scan(owner, {}) == {}


async def test_a_pid_that_was_used_again_claims_no_session(world):
    supervisor, _, _ = world
    leader = run(supervisor, "r", "import time; time.sleep(600)")
    earlier = MainProcess(leader.pid, leader.start - 1)
    owner = Owner("another node", "")
    assert process.scan(owner, {"old": earlier}) == {}
    assert process.scan(owner, {"new": leader}) == {"new": {leader.pid}}


async def test_terminate_reaches_the_main_process_alone(world):
    supervisor, exits, folder = world
    pids = await family(supervisor, folder)
    supervisor.terminate("r")
    await until(lambda: exits, "the exit of the root")
    assert exits == [("r", -signal.SIGTERM)]
    assert all(map(alive, pids[1:]))
    await supervisor.kill_tree("r")
    assert not any(map(alive, pids))


async def test_a_tree_that_grows_while_it_is_killed_is_killed(world):
    supervisor, _, _ = world
    code = """
        import os, time
        end = time.monotonic() + 60  # also if this test itself is killed
        while time.monotonic() < end:  # each generation dies soon, but not before it has a child
            if os.fork():
                time.sleep(0.02)
                os._exit(0)
    """
    run(supervisor, "r", code)
    await asyncio.wait_for(supervisor.kill_tree("r"), DEADLINE_S)
    assert "r" not in await supervisor.trees()


async def test_a_child_born_while_its_parent_ends_is_found_by_the_same_scan(world, monkeypatch):
    """The listing still has the parent alone; by the time of the look, only the child is there."""
    supervisor, exits, folder = world
    ended = run(supervisor, "gone", "pass")
    await until(lambda: exits, "the exit of the parent")
    child = run(supervisor, "r", "import time; time.sleep(600)")
    listings = iter([[str(ended.pid)]])
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: next(listings, None) or listed(path))
    assert process.scan(Owner("node", str(folder)), {}) == {"r": {child.pid}}


async def test_a_host_that_starts_processes_all_the_time_is_not_scanned_over_and_over(
    world, monkeypatch
):
    """Each listing has one foreign process more; none of them can be the parent of ours."""
    supervisor, _, folder = world
    ours = run(supervisor, "r", "import time; time.sleep(600)").pid
    all_pids = [p.pid for p in psutil.process_iter() if process.start_ticks(p.pid)]
    foreign = [str(pid) for pid in all_pids if pid not in (ours, os.getpid())]
    assert len(foreign) > 3, "this machine runs hardly anything"
    listings: list[list[str]] = []

    def listing(path):
        listings.append([str(ours), *foreign[: len(listings)]])
        return listings[-1]

    monkeypatch.setattr(os, "listdir", listing)
    assert process.scan(Owner("node", str(folder)), {}) == {"r": {ours}}
    assert len(listings) == 2


async def test_an_engine_is_adopted_and_its_exit_seen(world):
    """An agent that was started again is not the parent: the process is one of another agent's."""
    supervisor, _, folder = world
    leader = run(supervisor, "r", "import time; time.sleep(600)")
    exits = Exits()
    successor = Supervisor(Owner("node", str(folder)), folder / "logs", exits)
    assert successor.adopt("r", leader)
    successor.terminate("r")
    await until(lambda: exits, "the exit")
    assert exits == [("r", None)]
    successor.close()


async def test_a_dead_or_reused_pid_is_not_adopted(world):
    supervisor, exits, _ = world
    leader = run(supervisor, "r", "import time; time.sleep(600)")
    assert not supervisor.adopt("s", MainProcess(leader.pid, leader.start + 1))
    os.kill(leader.pid, signal.SIGKILL)
    await until(lambda: exits, "the exit")
    assert not supervisor.adopt("t", leader)
    await asyncio.wait_for(supervisor.kill_tree("t"), DEADLINE_S)


async def test_the_environment_is_clean(world, monkeypatch):
    supervisor, exits, _ = world
    for name, value in {
        "STOKER_CLUSTER_TOKEN": "s3cret",
        "SOME_PASSWORD": "s3cret",
        "HF_TOKEN": "hf",
        "https_proxy": "p",
    }.items():
        monkeypatch.setenv(name, value)
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    run(supervisor, "r", code, env={"MINE": "1", "STOKER_NODE_ID": "not this"})
    await until(lambda: exits, "the exit")
    text = supervisor.log_tail("r")
    assert "s3cret" not in text
    for expected in (
        '"MINE": "1"',
        '"HF_TOKEN": "hf"',
        '"https_proxy": "p"',
        '"STOKER_NODE_ID": "node"',
        '"STOKER_REPLICA_ID": "r"',
        '"PATH"',
    ):
        assert expected in text


async def test_a_child_inherits_no_descriptor_but_its_log(world):
    supervisor, exits, _ = world
    code = """
        import os
        open_now = os.listdir("/proc/self/fd")  # one more is the listing's own
        print(len(open_now) - 1, os.readlink("/proc/self/fd/0"))
    """
    run(supervisor, "r", code)
    await until(lambda: exits, "the exit")
    assert supervisor.log_tail("r") == "3 /dev/null\n"


async def test_the_tail_is_of_this_start_only(world):
    supervisor, exits, _ = world
    run(supervisor, "r", "print('the first start')")
    await until(lambda: len(exits) == 1, "the first exit")
    run(supervisor, "r", "print('the second start')")
    await until(lambda: len(exits) == 2, "the second exit")
    assert supervisor.log_tail("r") == "the second start\n"
    assert "the first start" in supervisor.log_path("r").read_text()


async def test_a_log_over_its_limit_is_cut_while_it_is_written(world):
    supervisor, exits, folder = world
    code = f"""
        import os, sys, time
        sys.stdout.write("old " * ({LOG_LIMIT_BYTES} // 4 + 1))
        sys.stdout.flush()
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        print("new")
    """
    go = folder / "go"
    run(supervisor, "r", code, str(go))
    log = supervisor.log_path("r")
    await until(lambda: log.stat().st_size > LOG_LIMIT_BYTES, "a full log")
    supervisor.rotate_logs()
    assert log.stat().st_size == 0
    go.touch()
    await until(lambda: exits, "the exit")
    assert log.read_text() == "new\n"
    assert (folder / "logs" / "r.log.1").stat().st_size == LOG_LIMIT_BYTES
