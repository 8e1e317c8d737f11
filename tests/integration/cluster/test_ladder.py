"""The warmth ladder as an operator sees it: a real `stoker up`, the stub engine and the CLI."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

from tests.kits.cluster import Cluster, running, wait_until


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("STOKER_SCHEDULER_MIN_DWELL_S", "0")
    with running(tmp_path / "state", "--devices", "simulated:1x24GiB") as up:
        yield up


def test_two_models_take_turns_by_sleeping_and_every_turn_is_explained(cluster: Cluster) -> None:
    # Without a device that measures, what a sleeping stub keeps in host memory is its booking.
    cluster.add_stub("a", 4, device_memory_bytes="4GiB")
    cluster.add_stub("b", 22)
    assert cluster.complete("a").status_code == 200
    first = cluster.engine_pids()
    assert cluster.complete("b").status_code == 200
    assert cluster.replicas("a")[0]["state"] == "asleep"
    listed = requests.get(f"{cluster.router}/v1/models", timeout=10).json()["data"]
    assert {m["id"]: m["warmth"] for m in listed} == {"a": "asleep", "b": "hot"}
    assert cluster.complete("a").status_code == 200
    assert first.items() <= cluster.engine_pids().items()  # the same process woke up

    def written() -> list[dict]:
        records = json.loads(cluster.stoker("coldstarts", "--json"))["cold_starts"]
        return records if len(records) == 3 else []

    records = wait_until(written, "the post-mortems: an agent tells its phases a moment later")
    assert [(r["model"], r["rung"], r["outcome"]) for r in records] == [
        ("a", "asleep-1", "ready"),
        ("b", "cached", "ready"),
        ("a", "cached", "ready"),
    ]
    for record in records:
        assert sum(record["phases"].values()) == pytest.approx(record["total_s"], abs=0.01)
    assert {"wake", "canary"} <= records[0]["phases"].keys()
    assert "asleep-1" in cluster.stoker("coldstarts", "--model", "a")
    shown = cluster.stoker("footprint", "a")
    assert "declared" in shown
    assert "wake-1" in shown
    metrics = requests.get(
        f"{cluster.up['admin']}/metrics",
        headers={"Authorization": f"Bearer {cluster.up['token']}"},
        timeout=10,
    ).text
    assert 'stoker_cold_start_seconds_count{outcome="ready",rung="asleep-1"} 1.0' in metrics


def test_what_was_learnt_survives_a_scheduler(cluster: Cluster) -> None:
    cluster.add_stub("a")
    assert cluster.complete("a").status_code == 200
    stored = "no footprint yet"

    def saved() -> bool:
        nonlocal stored
        found = cluster.try_admin("/admin/models/a/footprint")
        known = found["measured"] if found else ()
        stored = json.dumps(known[0]["times"]["start-cached"]) if known else ""
        return bool(stored)

    wait_until(saved, "a footprint")
    before = stored
    # Learnt figures are written within SAVE_S; the next leader reads them.
    wait_until(lambda: _is_kept(cluster, "footprints"), "the footprint in the registry")
    cluster.kill_part("scheduler")
    wait_until(lambda: (cluster.try_admin("/healthz") or {}).get("status") == "ok", "recovered")
    wait_until(saved, "the footprint again")
    assert stored == before


def _is_kept(cluster: Cluster, kind: str) -> bool:
    """Whether the registry has such a key: what stands in the log of its file may be undone."""
    with closing(sqlite3.connect(f"file:{cluster.state_dir}/registry.db?mode=ro", uri=True)) as db:
        query = "SELECT count(*) FROM kv WHERE key LIKE ?"
        return bool(db.execute(query, (f"%/{kind}/%",)).fetchone()[0])


def test_a_model_is_warm_by_the_time_it_was_asked_for(cluster: Cluster) -> None:
    cluster.add_stub("a")
    soon = datetime.now(UTC) + timedelta(seconds=3)
    cluster.stoker("prewarm", "a", "--by", soon.isoformat(), "--for", "600")
    wait_until(lambda: cluster.replicas("a"), "started ahead of its time")
    wait_until(lambda: cluster.admin("GET", "/admin/models/a")["ready"], "ready")
    (decision,) = cluster.admin("GET", "/admin/decisions?model=a")["decisions"]
    assert decision["cause"] == "prewarm: hot"
    refused = cluster.stoker("prewarm", "a", "--by", "tomorrow", status=1)
    assert "is not a time with a time zone" in refused


SLOW_S = 120.0  # longer than anything here takes on a busy machine


def hang_up(cluster: Cluster, model: str, state: str) -> None:
    """Call a model, and leave once its replica is in that state."""
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cluster.complete, model, timeout=3)
        wait_until(lambda: state in [r["state"] for r in cluster.replicas(model)], state)
        with pytest.raises(requests.Timeout):
            call.result()


def test_a_slow_start_that_nobody_waits_for_keeps_nobody_waiting(cluster: Cluster) -> None:
    cluster.add_stub("slow", 22, engine_args={"start_s": SLOW_S})
    cluster.add_stub("quick", 22)
    hang_up(cluster, "slow", "starting")
    assert cluster.complete("quick", timeout=SLOW_S / 2).ok


def test_a_slow_wake_that_nobody_waits_for_keeps_nobody_waiting(cluster: Cluster) -> None:
    cluster.add_stub("slow", 4, engine_args={"wake_1_s": SLOW_S, "wake_2_s": SLOW_S})
    cluster.add_stub("quick", 22)
    assert cluster.complete("slow").ok
    assert cluster.complete("quick").ok
    assert cluster.replicas("slow")[0]["state"] == "asleep"
    hang_up(cluster, "slow", "waking")
    assert cluster.complete("quick", timeout=SLOW_S / 2).ok
    assert "waking" not in [r["state"] for r in cluster.replicas("slow")]


def test_model_add_says_that_a_model_is_on_its_way(cluster: Cluster, tmp_path: Path) -> None:
    """It is being placed, and said so: not that it can't run, with the place for a reason."""
    file = tmp_path / "m.yaml"
    spec = {
        "name": "m", "source": "/stub", "engine": "stub", "device_memory_bytes": "4GiB",
        "min_replicas": 1, "engine_args": {"start_s": SLOW_S},
    }  # fmt: skip
    file.write_text(json.dumps(spec))
    said = cluster.stoker("model", "add", str(file))
    for _ in range(2):
        assert "added m" in said or "unchanged m" in said
        assert "can't run" not in said, said
        wait_until(lambda: cluster.replicas("m"), "it is placed")
        said = cluster.stoker("model", "add", str(file))
    assert "it is on its way: starting on" in said
    assert "best fit" not in said
