"""Versions on a real `stoker up`: A/B, canary, blue-green, mirror and fallback."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.kits.cluster import Cluster, running, wait_until


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    state = tmp_path_factory.mktemp("versions") / "state"
    with running(state, "--devices", "simulated:4x80GiB") as up:
        yield up


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path / "state", "--devices", "simulated:2x80GiB") as up:
        yield up


def ask(cluster: Cluster, name: str, **fields: Any) -> tuple[int, str]:
    """The status, and the model that answered."""
    body = {"model": name, "prompt": "one two", "max_tokens": 2, **fields}
    answer = requests.post(f"{cluster.router}/v1/completions", json=body, timeout=60)
    return answer.status_code, answer.headers.get("X-Stoker-Model", "")


def ask_often(cluster: Cluster, name: str, times: int, **fields: Any) -> Counter[tuple[int, str]]:
    with ThreadPoolExecutor(4) as pool:
        return Counter(pool.map(lambda _: ask(cluster, name, **fields), range(times)))


@contextmanager
def traffic(cluster: Cluster, name: str) -> Iterator[list[tuple[int, str]]]:
    """Three callers that go on until the block ends; what they got."""
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            answers.append(ask(cluster, name))
            stop.wait(0.01)

    callers = [threading.Thread(target=caller) for _ in range(3)]
    for thread in callers:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in callers:
            thread.join(70)


def route(cluster: Cluster, name: str) -> dict[str, Any]:
    return cluster.admin("GET", f"/admin/routes/{name}")


def shares(cluster: Cluster, name: str) -> dict[str, float]:
    return {t["model"]: t["share"] for t in route(cluster, name)["targets"]}


def audit(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """Oldest first."""
    return cluster.admin("GET", f"/admin/audit?route={name}")["audit"][::-1]


def metric(cluster: Cluster, line: str) -> float:
    """The sum of a router's figures that begin so; 0 where there is none yet."""
    text = requests.get(f"{cluster.router}/metrics", timeout=10).text
    return sum(float(r.rpartition(" ")[2]) for r in text.splitlines() if r.startswith(line))


# ------------------------------------------------------------------------------ weights


def test_two_versions_share_the_requests_and_a_caller_keeps_its_own(cluster: Cluster) -> None:
    cluster.add_stub("ab-1", 4)
    cluster.add_stub("ab-2", 4)
    said = cluster.stoker("route", "set", "ab", "--to", "ab-1=3@1.0.0", "--to", "ab-2=1@2.0.0")
    assert said == "ab: ab-1 75 %, ab-2 25 %\n"
    seen = ask_often(cluster, "ab", 200)
    assert set(seen) == {(200, "ab-1"), (200, "ab-2")}
    assert 20 <= seen[200, "ab-2"] <= 85
    assert set(ask_often(cluster, "ab@2", 5)) == {(200, "ab-2")}
    cluster.stoker("route", "set", "ab", "--to", "ab-1", "--to", "ab-2", "--sticky", "user")
    for user in ("ann", "bob", "cid"):
        assert len(ask_often(cluster, "ab", 8, user=user)) == 1
    listed = requests.get(f"{cluster.router}/v1/models", timeout=10).json()["data"]
    assert {"ab", "ab-1", "ab-2"} <= {m["id"] for m in listed}
    wait_until(lambda: sum(t["requests"] for t in route(cluster, "ab")["targets"]) == 24, "counts")
    assert "ab-2" in cluster.stoker("route", "show", "ab")
    changes = [(e["action"], e["reason"], e["who"]) for e in audit(cluster, "ab")]
    assert changes == [("put", "added", "cluster"), ("put", "changed", "cluster")]
    assert audit(cluster, "ab")[1]["old"]["targets"][0]["weight"] == 3


def test_names_and_models_in_use_are_guarded(cluster: Cluster) -> None:
    cluster.add_stub("used", 4)
    rule = {"name": "guarded", "targets": [{"model": "used"}]}
    cluster.admin("PUT", "/admin/routes/guarded", rule)
    assert "route 'guarded'" in cluster.stoker("model", "rm", "used", status=1)
    clash = {"name": "guarded", "source": "/stub", "engine": "stub", "device_memory_bytes": 2**30}
    with pytest.raises(AssertionError, match=r"409 .*already a name of route 'guarded'"):
        cluster.admin("POST", "/admin/models", clash)
    with pytest.raises(AssertionError, match=r"409 .*already a name of model 'used'"):
        cluster.admin("PUT", "/admin/routes/used", {**rule, "name": "used"})
    with pytest.raises(AssertionError, match=r"422 .*did you mean 'used'"):
        cluster.admin("PUT", "/admin/routes/x", {"name": "x", "targets": [{"model": "usd"}]})
    assert json.loads(cluster.stoker("route", "rm", "guarded", "--json")) == {"removed": "guarded"}
    cluster.stoker("model", "rm", "used")
    assert ask(cluster, "guarded")[0] == 404


# ------------------------------------------------------------------------------ fallback, mirror


def test_a_model_that_cant_start_is_stood_in_for(cluster: Cluster) -> None:
    cluster.add_stub("never", 4, engine_args={"fail_start": "bad_model"})
    cluster.add_stub("spare", 4)
    cluster.stoker("route", "set", "fb", "--to", "never", "--fallback", "spare")
    assert ask(cluster, "fb") == (200, "spare")
    assert set(ask_often(cluster, "fb", 8)) == {(200, "spare")}


def test_a_shadow_sees_what_the_callers_ask_and_they_see_nothing_of_it(cluster: Cluster) -> None:
    cluster.add_stub("seen", 4)
    cluster.add_stub("shadow", 4, engine_args={"fail_every": 1})
    cluster.stoker("route", "set", "mi", "--to", "seen", "--mirror", "shadow")
    assert set(ask_often(cluster, "mi", 12)) == {(200, "seen")}
    line = 'stoker_router_route_requests_total{model="shadow",route="mi"}'
    wait_until(lambda: metric(cluster, line) == 12, "the copies ended")
    assert cluster.replicas("shadow")[0]["state"] == "ready"


# ------------------------------------------------------------------------------ canary


def canary(cluster: Cluster, name: str, *steps: int, **bad: Any) -> None:
    """Two versions, the second being tried by `steps`; both are warm."""
    for version, args in (("1", {}), ("2", bad)):
        cluster.add_stub(f"{name}-{version}", 4, engine_args=args)
        cluster.stoker("load", f"{name}-{version}")
    cluster.stoker(
        "route", "set", name, "--to", f"{name}-1", "--canary", f"{name}-2",
        "--steps", ",".join(map(str, steps)), "--interval", "1", "--min-requests", "12",
        "--max-error-rate", "0.1", "--max-ttft-ratio", "1000",
    )  # fmt: skip


def test_a_version_that_fails_is_rolled_back_by_itself(cluster: Cluster) -> None:
    canary(cluster, "bad", 20, 60, fail_every=2)
    assert shares(cluster, "bad") == {"bad-1": 80, "bad-2": 20}
    with traffic(cluster, "bad"):
        wait_until(lambda: route(cluster, "bad")["canary"] is None, "it was rolled back")
    assert shares(cluster, "bad") == {"bad-1": 100, "bad-2": 0}
    last = audit(cluster, "bad")[-1]
    assert (last["action"], last["who"], last["new"]["canary"]) == ("rollback", "canary", None)
    assert "10.0% is max_error_rate" in last["reason"]
    assert set(ask_often(cluster, "bad", 20)) == {(200, "bad-1")}
    assert "rollback" in cluster.stoker("audit", "--route", "bad")


def test_a_good_version_takes_over_step_by_step(cluster: Cluster) -> None:
    canary(cluster, "good", 30, 60)
    with traffic(cluster, "good") as answers:
        wait_until(lambda: route(cluster, "good")["canary"] is None, "it was promoted")
    assert {status for status, _ in answers} == {200}
    assert shares(cluster, "good") == {"good-1": 0, "good-2": 100}
    trail = audit(cluster, "good")
    assert [e["action"] for e in trail] == ["put", "step", "promote"]
    assert [t["weight"] for t in trail[1]["new"]["targets"]] == [40, 60]
    assert set(ask_often(cluster, "good", 8)) == {(200, "good-2")}


def test_an_operator_ends_a_canary(cluster: Cluster) -> None:
    canary(cluster, "op", 10)
    said = cluster.stoker("route", "promote", "op", "--reason", "it is friday")
    assert said == "op: op-1 0 %, op-2 100 %\n"
    assert audit(cluster, "op")[-1]["reason"] == "it is friday"
    assert "no canary" in cluster.stoker("route", "promote", "op", status=1)
    assert "neither a canary nor" in cluster.stoker("route", "rollback", "op", status=1)


# ------------------------------------------------------------------------------ blue-green

BG = ("blue", "green")


def test_green_is_warm_before_it_is_asked(cluster: Cluster) -> None:
    cluster.add_stub("blue", 4)
    cluster.add_stub("green", 4, engine_args={"start_s": 2.0})
    cluster.stoker("route", "set", "bg", "--to", "blue", "--to", "green=0")
    assert ask(cluster, "bg") == (200, "blue")
    with traffic(cluster, "bg") as answers:
        said = cluster.stoker("route", "switch", "bg", "green")
        wait_until(lambda: answers[-1][1] == "green", "green answers")
    assert said == "bg: blue 0 %, green 100 %\n"
    assert {status for status, _ in answers} == {200}
    held = {m: metric(cluster, f'llm_hold_seconds_count{{model="{m}"') for m in BG}
    assert held == {"blue": 1, "green": 0}
    assert [e["action"] for e in audit(cluster, "bg")] == ["put", "switch", "switched"]
    assert "everything to 'green' already" in cluster.stoker(
        "route", "switch", "bg", "green", status=1
    )


def test_a_switch_to_what_cant_start_changes_nothing(cluster: Cluster) -> None:
    cluster.add_stub("sky", 4)
    cluster.add_stub("mud", 4, engine_args={"fail_start": "oom"})
    cluster.stoker("route", "set", "sw", "--to", "sky", "--to", "mud=0")
    said = cluster.stoker("route", "switch", "sw", "mud", "--deadline", "3", status=1)
    assert "sw was not switched: 0 of 1 of mud were ready after 3 s" in said
    assert shares(cluster, "sw") == {"sky": 100, "mud": 0}
    assert audit(cluster, "sw")[-1]["action"] == "switch_failed"
    assert ask(cluster, "sw") == (200, "sky")


# ------------------------------------------------------------------------------ restarts


def test_routes_and_what_is_under_way_outlive_a_scheduler(own_cluster: Cluster) -> None:
    cluster = own_cluster
    cluster.add_stub("blue", 4)
    cluster.add_stub("green", 4, engine_args={"start_s": 6.0})
    cluster.add_stub("new", 4)
    cluster.stoker("route", "set", "bg", "--to", "blue", "--to", "green=0")
    cluster.stoker("route", "set", "ca", "--to", "blue", "--canary", "new", "--steps", "10,20")
    assert ask(cluster, "bg") == (200, "blue")
    cluster.stoker("route", "switch", "bg", "green", "--no-wait")
    before = audit(cluster, "bg")
    with traffic(cluster, "bg") as answers:
        cluster.kill_part("scheduler")
        wait_until(lambda: cluster.try_admin("/admin/routes"), "the next one leads", 90)
        pending = route(cluster, "bg")
        wait_until(lambda: answers[-1][1] == "green", "the next leader went on with the switch")
    assert {status for status, _ in answers} == {200}
    assert audit(cluster, "bg")[: len(before)] == before
    assert pending["switch"] is None or pending["switch"]["to"] == "green"
    assert audit(cluster, "bg")[-1]["action"] == "switched"
    kept = route(cluster, "ca")
    assert (kept["canary"]["step"], shares(cluster, "ca")) == (1, {"blue": 90, "new": 10})


def test_a_router_alone_goes_by_the_last_routes(own_cluster: Cluster) -> None:
    cluster = own_cluster
    cluster.add_stub("one", 4)
    cluster.stoker("route", "set", "alone", "--to", "one")
    assert ask(cluster, "alone") == (200, "one")
    scheduler = cluster.part("scheduler")
    scheduler.send_signal(signal.SIGSTOP)
    try:
        cluster.kill_part("router")

        def served() -> bool:
            try:
                return ask(cluster, "alone") == (200, "one")
            except requests.ConnectionError:
                return False

        wait_until(served, "the new router serves the route")
    finally:
        scheduler.send_signal(signal.SIGCONT)
