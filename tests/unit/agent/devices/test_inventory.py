"""The host's RAM and declared devices; GPUs are in tests/integration/agent/test_nvml.py."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.devices import inventory
from agent.devices.inventory import CpuSource, SimulatedSource, open_devices

MIB = 2**20
GIB = 2**30

HOLD = "data = b'x' * (int(__import__('sys').argv[1])); print(1, flush=True); input()"


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that holds 100 MiB and says when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(100 * MIB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.communicate("\n", timeout=10)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("gpu", "agent.devices = 'gpu' is not known; write auto"),
        ("", "agent.devices = '' is not known"),
        ("simulated", "is not known"),
        ("nvml:1", "is not known"),
        ("simulated:24GiB", "COUNT"),
        ("simulated:0x24GiB", "COUNT 1 or more"),
        ("simulated:2x0", "more than 0"),
        ("simulated:2xbig", "'big' is not a size"),
        ("cpu:lots", "'lots' is not a size"),
        ("cpu:", "'' is not a size"),
        ("cpu:0GiB", "more than 0"),
        ("cpu:900TiB", "'cpu:900TiB' is more than this host"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(setting: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"agent\.devices") as error:
        open_devices(setting, "n1")
    assert says in str(error.value)


def test_simulated_devices_are_as_declared_and_measure_nothing() -> None:
    source = open_devices("simulated:2x24GiB", "n1")
    assert isinstance(source, SimulatedSource)
    first, second = source.read({"r": [os.getpid()]})
    assert (first.device_id, second.device_id) == ("simulated:n1:0", "simulated:n1:1")
    assert (first.kind, first.index, second.index) == ("simulated", 0, 1)
    assert (first.memory_total_bytes, first.memory_used_bytes, first.foreign_bytes) == (
        24 * GIB,
        0,
        0,
    )
    assert source.replica_bytes() == {}


def test_a_declared_size_is_a_partition_of_our_own(holder: subprocess.Popen[str]) -> None:
    source = open_devices("cpu:2GiB", "n1")
    (report,) = source.read({"a": [holder.pid], "b": []})
    measured = source.replica_bytes()
    assert 100 * MIB <= measured["a"] < 200 * MIB
    assert measured["b"] == 0
    assert report.device_id == "cpu:n1"
    assert report.kind == "cpu"
    assert report.name
    assert report.memory_total_bytes == 2 * GIB
    assert (report.memory_used_bytes, report.foreign_bytes) == (measured["a"], 0)


def test_a_process_that_is_gone_has_no_bytes() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    source = CpuSource("n1", GIB)
    (report,) = source.read({"a": [process.pid]})
    assert report.memory_used_bytes == 0


def test_without_pss_the_resident_size_is_taken(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = inventory._text
    monkeypatch.setattr(
        inventory, "_text", lambda path: "" if path.name == "smaps_rollup" else read(path)
    )
    source = CpuSource("n1", GIB)
    source.read({"a": [holder.pid]})
    assert source.replica_bytes()["a"] == psutil.Process(holder.pid).memory_info().rss


def test_without_a_size_the_device_is_a_share_of_what_this_host_may_use() -> None:
    source = open_devices("cpu", "n1")
    (report,) = source.read({})
    limit_bytes, used_bytes = inventory.host_memory()
    assert 0 < used_bytes < limit_bytes <= psutil.virtual_memory().total
    assert report.memory_total_bytes == int(limit_bytes * inventory.HOST_SHARE)


def test_what_others_use_beyond_the_rest_is_foreign(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {"bytes": 1 * GIB}
    monkeypatch.setattr(inventory, "host_memory", lambda: (10 * GIB, used["bytes"]))
    source = CpuSource("n1", None)  # 8 GiB are the device's, 2 GiB the rest
    assert source.read({})[0].foreign_bytes == 0
    used["bytes"] = 5 * GIB
    (report,) = source.read({"a": [holder.pid]})
    ours = source.replica_bytes()["a"]
    assert report.foreign_bytes == 3 * GIB - ours
    assert report.memory_used_bytes == 3 * GIB


def test_utilization_is_of_the_time_between_two_reads() -> None:
    source = CpuSource("n1", GIB)
    deadline = time.monotonic() + 10
    report = None
    while time.monotonic() < deadline and (report is None or not report.utilization):
        sum(range(1_000_000))  # keeps one core busy
        (report,) = source.read({})
    assert report is not None
    assert report.utilization is not None
    assert 0 < report.utilization <= 1


def _cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> Path:
    read = inventory._text
    monkeypatch.setattr(inventory, "_CGROUP", tmp_path)
    monkeypatch.setattr(
        inventory, "_text", lambda p: lines if p == Path("/proc/self/cgroup") else read(p)
    )
    return tmp_path


def test_the_tightest_cgroup_limit_of_the_branch_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _cgroups(tmp_path, monkeypatch, "0::/stoker/agent\n")
    outer, inner = root / "stoker", root / "stoker" / "agent"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (outer / "memory.max").write_text(f"{512 * MIB}\n")
    (outer / "memory.current").write_text(f"{300 * MIB}\n")
    (outer / "memory.stat").write_text(f"anon 1\ninactive_file {100 * MIB}\n")
    assert inventory.host_memory() == (512 * MIB, 200 * MIB)


def test_a_version_1_cgroup_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _cgroups(tmp_path, monkeypatch, "4:cpu,cpuacct:/x\n3:memory:/box\n0::/\n")
    box = root / "memory" / "box"
    box.mkdir(parents=True)
    (box / "memory.limit_in_bytes").write_text(f"{256 * MIB}\n")
    (box / "memory.usage_in_bytes").write_text(f"{100 * MIB}\n")
    (box / "memory.stat").write_text(f"total_inactive_file {30 * MIB}\n")
    assert inventory.host_memory() == (256 * MIB, 70 * MIB)
