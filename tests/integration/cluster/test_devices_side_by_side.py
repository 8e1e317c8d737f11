"""Several cold models called at once on a host with several devices, live."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kits.cluster import running, wait_until

NAMES = ("a", "b", "c", "d")


def test_four_models_called_at_once_start_at_once(tmp_path: Path) -> None:
    """None waits for another's turn: by the post-mortems of their cold starts."""
    with running(tmp_path / "state", "--devices", "simulated:4x24GiB") as cluster:
        for name in NAMES:
            cluster.add_stub(name, gib=5, engine_args={"start_s": 2.0})
        with ThreadPoolExecutor(len(NAMES)) as pool:
            answers = list(pool.map(cluster.complete, NAMES))
        assert [answer.status_code for answer in answers] == [200] * 4, answers
        replicas = {r["model"]: r for r in cluster.replicas()}
        devices = {name: tuple(replicas[name]["device_ids"]) for name in NAMES}
        # A simulated device is no slower for a second start, and never gets a third.
        assert max(Counter(devices.values()).values()) <= 2, devices

        def told() -> list[dict[str, object]]:
            found = cluster.admin("GET", "/admin/coldstarts")["cold_starts"]
            return found if {one["model"] for one in found} == set(NAMES) else []

        for one in wait_until(told, "four post-mortems"):
            assert one["phases"]["turn"] < 2.0, one  # seconds of one start
