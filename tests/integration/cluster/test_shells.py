"""An engine that is pointed at another model, live: the real parts with the stub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kits.cluster import Cluster, running, wait_until

ARGS = {"start_s": 3.0, "shell": "tiny"}
START_S = 3.0


def add(cluster: Cluster, name: str, **engine_args: Any) -> None:
    cluster.add_stub(name, gib=8, sleep="off", engine_args=ARGS | engine_args)


def serve(cluster: Cluster, name: str) -> None:
    answer = cluster.complete(name)
    assert answer.status_code == 200, answer.text


def cold_start(cluster: Cluster, model: str, count: int) -> dict[str, Any]:
    """The post-mortem of the model's start number `count`."""

    def told() -> list[dict[str, Any]]:
        found = cluster.admin("GET", "/admin/coldstarts")["cold_starts"]
        mine = sorted((one for one in found if one["model"] == model), key=lambda o: o["number"])
        return mine if len(mine) >= count else []

    return wait_until(told, f"{count} post-mortems of {model}")[count - 1]


def known(cluster: Cluster, *models: str) -> None:
    """Until the node has told that the canaries of these models are known there."""

    def told() -> bool:
        (node,) = cluster.admin("GET", "/admin/nodes")["nodes"]
        return set(models) <= set(node["shells"])

    wait_until(told, f"the canaries of {models}")


def test_a_model_that_was_here_before_is_served_by_the_engine_that_runs(tmp_path: Path) -> None:
    with running(tmp_path / "state", "--devices", "simulated:1x10GiB") as cluster:
        for name in ("a", "b"):
            add(cluster, name)
            serve(cluster, name)
            known(cluster, name)
        (before,) = cluster.replicas()
        for name in ("a", "b", "a"):
            serve(cluster, name)
            (now,) = cluster.replicas()
            assert now["model"] == name
            assert (now["replica_id"], now["pid"]) == (before["replica_id"], before["pid"])
        one = cold_start(cluster, "a", 2)
        assert (one["rung"], one["outcome"]) == ("shell", "ready")
        # What `a` waited for was that `b` may go (min_dwell_s); no start came after that.
        assert one["total_s"] - one["phases"]["queue"] < START_S
        assert "canary" in one["phases"]
        assert one["reason"] == "in the engine of b"


def test_one_that_answers_otherwise_is_started_plainly_and_never_pointed_again(
    tmp_path: Path,
) -> None:
    with running(tmp_path / "state", "--devices", "simulated:1x10GiB") as cluster:
        for name in ("a", "b"):
            add(cluster, name, repoint_gibberish=True)
            serve(cluster, name)
            known(cluster, name)
        (before,) = cluster.replicas()
        serve(cluster, "a")
        (now,) = cluster.replicas()
        assert now["model"] == "a"
        assert now["pid"] != before["pid"]
        assert "canary" in now["disabled"]["shell"]
        serve(cluster, "b")
        serve(cluster, "a")
        assert cold_start(cluster, "a", 3)["rung"] != "shell"
        answers = [cluster.complete("a").json()["choices"][0]["text"] for _ in range(3)]
        assert len(set(answers)) == 1


@pytest.mark.parametrize("how", ["refused", "half_way"])
def test_an_engine_that_fails_at_it_loses_no_request(tmp_path: Path, how: str) -> None:
    with running(tmp_path / "state", "--devices", "simulated:1x10GiB") as cluster:
        for name in ("a", "b"):
            add(cluster, name, fail_repoint=how)
            serve(cluster, name)
            known(cluster, name)
        serve(cluster, "a")
        (now,) = cluster.replicas()
        assert now["model"] == "a"
        assert now["disabled"]["shell"]
