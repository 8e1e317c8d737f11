"""What an operator must be able to rely on, on real processes: herds, kills, leaks."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.kits.cluster import Cluster, alive, running, wait_until
from tests.kits.consul_server import MISSING, consul_is_installed, consul_server

CYCLES = int(os.environ.get("STOKER_TEST_CYCLES", "60"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path / "state", "--devices", "simulated:4x24GiB") as up:
        yield up


@pytest.fixture(params=["embedded", pytest.param("consul", marks=pytest.mark.consul)])
def any_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """With each kind of registry: what is left of a killed part differs between them."""
    options = ["--devices", "simulated:4x24GiB"]
    with ExitStack() as stack:
        if request.param == "consul":
            if not consul_is_installed():
                pytest.skip(MISSING)
            options += ["--consul", stack.enter_context(consul_server())]
        yield stack.enter_context(running(tmp_path / "state", *options))


def test_200_requests_to_a_cold_model_cause_one_start(cluster: Cluster) -> None:
    cluster.add_stub("herd", engine_args={"start_s": 1.5})
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: cluster.complete("herd"), range(200)))
    assert Counter(a.status_code for a in answers) == {200: 200}
    assert all(a.json()["choices"][0]["text"] for a in answers)
    decisions = cluster.admin("GET", "/admin/decisions?model=herd")["decisions"]
    assert [d["action"] for d in decisions] == ["start"]


def test_an_engine_killed_under_load_loses_no_unstarted_request(cluster: Cluster) -> None:
    args = {"ttft_s": 1.0, "token_s": 0.01}
    cluster.add_stub("victim", engine_args=args, target_concurrency=40)
    assert cluster.complete("victim").status_code == 200
    (first,) = cluster.engine_pids().values()
    with ThreadPoolExecutor(40) as pool:
        futures = [pool.submit(cluster.complete, "victim") for _ in range(40)]
        wait_until(lambda: cluster.replicas("victim")[0]["in_flight"] == 40, "40 in flight")
        psutil.Process(first).kill()
        answers = [f.result() for f in futures]
    assert Counter(a.status_code for a in answers) == {200: 40}
    assert first not in cluster.engine_pids().values()
    assert cluster.replicas("victim")[0]["restarts"] == 1


def test_a_killed_agent_leaves_its_engines_serving_and_the_next_one_adopts_them(
    any_cluster: Cluster,
) -> None:
    any_cluster.add_stub("steady")
    assert any_cluster.complete("steady").status_code == 200
    before = any_cluster.engine_pids()
    (replica_id,) = before
    with traffic(any_cluster, "steady") as answers:
        any_cluster.kill_part("agent")
        seen = len(answers)
        wait_until(lambda: len(answers) > seen + 20, "traffic after the agent's death")
        log = any_cluster.state_dir / "logs/agent.log"
        wait_until(lambda: f"{replica_id} adopted" in log.read_text(), "adopted", limit_s=60)
        seen = len(answers)
        wait_until(lambda: len(answers) > seen + 20, "traffic after the adoption")
    assert set(answers) == {200}
    assert any_cluster.engine_pids() == before
    (replica,) = any_cluster.replicas("steady")
    assert (replica["state"], replica["restarts"]) == ("ready", 0)
    any_cluster.admin("POST", "/admin/models/steady/unload")  # the new agent owns it
    wait_until(lambda: not any_cluster.replicas("steady"), "the adopted engine stopped")
    assert not any(alive(pid) for pid in before.values())


def test_a_killed_scheduler_is_not_missed_and_restarts_nothing(any_cluster: Cluster) -> None:
    any_cluster.add_stub("warm")
    any_cluster.add_stub("other")
    assert any_cluster.complete("warm").status_code == 200
    before = any_cluster.engine_pids()
    with traffic(any_cluster, "warm") as answers:
        any_cluster.kill_part("scheduler")
        seen = len(answers)
        wait_until(lambda: len(answers) > seen + 20, "traffic without a scheduler")
        wait_until(lambda: any_cluster.try_admin("/admin/replicas"), "the next one leads", 90)
        wait_until(lambda: any_cluster.try_admin("/readyz"), "it knows its nodes")
    assert set(answers) == {200}
    assert any_cluster.engine_pids() == before
    (replica,) = any_cluster.replicas("warm")
    assert (replica["state"], replica["restarts"]) == ("ready", 0)
    decided = any_cluster.admin("GET", "/admin/decisions")["decisions"]
    assert [d["action"] for d in decided] == ["adopt"]
    assert any_cluster.complete("other").status_code == 200  # and it decides again


def test_a_killed_router_comes_back_with_its_table(any_cluster: Cluster) -> None:
    any_cluster.add_stub("warm")
    assert any_cluster.complete("warm").status_code == 200
    before = any_cluster.engine_pids()
    any_cluster.kill_part("router")

    def served() -> bool:
        try:
            return any_cluster.complete("warm").status_code == 200
        except requests.ConnectionError:
            return False

    wait_until(served, "the next router serves")
    assert any_cluster.engine_pids() == before


def test_load_and_unload_leak_nothing(cluster: Cluster) -> None:
    """STOKER_TEST_CYCLES=1000 for the full count; four models cycle side by side."""
    names = [f"m{i}" for i in range(4)]
    for name in names:
        cluster.add_stub(name, 20, engine_args={"start_s": 0.0})
    one_cycle(cluster, names[0])
    agent = cluster.part("agent")
    before = footprint(cluster, agent)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: cycles(cluster, name, CYCLES // 4), names))
    wait_until(lambda: footprint(cluster, agent)["processes"] == before["processes"], "all gone")
    after = footprint(cluster, agent)
    assert after["booked_bytes"] == before["booked_bytes"] == 0
    assert after["listening"] == before["listening"]
    assert after["replica_files"] == before["replica_files"]
    assert after["agent_fds"] <= before["agent_fds"] + 4  # connections kept alive
    starts = cluster.admin("GET", "/admin/decisions?limit=5000")["decisions"]
    assert sum(d["action"] == "start" for d in starts) >= min(CYCLES, 900)


def cycles(cluster: Cluster, name: str, count: int) -> None:
    for _ in range(count):
        one_cycle(cluster, name)


def one_cycle(cluster: Cluster, name: str) -> None:
    cluster.admin("POST", f"/admin/models/{name}/load", {})
    wait_until(lambda: cluster.admin("GET", f"/admin/models/{name}")["ready"], f"{name} ready")
    cluster.admin("POST", f"/admin/models/{name}/unload")
    wait_until(lambda: not cluster.admin("GET", f"/admin/models/{name}")["replicas"], "gone")


def footprint(cluster: Cluster, agent: psutil.Process) -> dict[str, Any]:
    """What a leak would show in."""
    processes = [psutil.Process(cluster.process.pid), *cluster.processes()]
    listening = sum(
        connection.status == psutil.CONN_LISTEN
        for process in processes
        for connection in process.net_connections("tcp")
    )
    devices = cluster.admin("GET", "/admin/devices")["devices"]
    return {
        "processes": len(processes),
        "listening": listening,
        "agent_fds": agent.num_fds(),
        "booked_bytes": sum(d["booked_bytes"] for d in devices),
        "replica_files": sorted(p.name for p in cluster.state_dir.glob("replicas/*")),
    }


class traffic:  # reads as a block
    """One request after another until the block ends; collects their HTTP status."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self.cluster, self.model = cluster, model
        self.answers: list[object] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> list[object]:
        self._thread.start()
        return self.answers

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self.cluster.complete(self.model).status_code)
            except requests.RequestException as error:
                self.answers.append(repr(error))
            time.sleep(0.02)
