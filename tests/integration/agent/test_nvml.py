"""Real pynvml over a stand-in for NVIDIA's library: every figure, and all that goes wrong."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kits.nvml_stub import Reader, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler (cc)")

GIB = 2**30
GPU = f"""\
0 uuid GPU-aaaa
0 name Stub H200
0 total {80 * GIB}
0 reserved {GIB}
0 used {10 * GIB}
0 free {69 * GIB}
0 util 42
0 temp_c 55
0 power_mw 123500
0 ecc 2
0 cc 9.0
0 bus 1
"""
SECOND = GPU.replace("\n0 ", "\n1 ").replace("0 uuid GPU-aaaa", "1 uuid GPU-bbbb", 1)
SECOND = SECOND.replace("bus 1", "bus 2")
THIRD = SECOND.replace("\n1 ", "\n2 ").replace("1 uuid GPU-bbbb", "2 uuid GPU-cccc", 1)
THIRD = THIRD.replace("bus 2", "bus 3")
NO_SUCH_PID = 4_194_305  # above the kernel's greatest pid_max


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.write_text(GPU)
    return path


@pytest.fixture
def reader(library: Path, state: Path) -> Iterator[Callable[..., Reader]]:
    opened: list[Reader] = []

    def start(setting: str = "nvml", folder: Path = library) -> Reader:
        opened.append(Reader(folder, state, setting))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def write(state: Path, *parts: str) -> None:
    """Replace the state in one step, so that no call sees half of it."""
    new = state.with_suffix(".new")
    new.write_text("\n".join(parts) + "\n")
    new.replace(state)


def test_every_figure(reader: Callable[..., Reader]) -> None:
    (report,) = reader().read()["reports"]
    assert report == {
        "device_id": "GPU-aaaa",
        "index": 0,
        "kind": "nvml",
        "name": "Stub H200",
        "memory_total_bytes": 79 * GIB,  # what may be allocated: not the driver's reserve
        "memory_used_bytes": 10 * GIB,
        "foreign_bytes": 10 * GIB,
        "utilization": 0.42,
        "temperature_c": 55.0,
        "power_w": 123.5,
        "ecc_uncorrected": 2,
        "xid": None,
        "compute_capability": 9.0,
        "nvlink_peers": [],
        "healthy": True,
        "unhealthy_reason": None,
    }


@pytest.mark.parametrize(
    ("links", "peers"),
    [
        pytest.param([], [[], [], []], id="none"),
        pytest.param(
            ["0 link_0 gpu 2", "0 link_1 gpu 2", "1 link_5 gpu 1"],
            [["GPU-bbbb"], ["GPU-aaaa"], []],
            id="a pair",
        ),
        pytest.param(
            ["0 link_0 switch 90", "1 link_0 switch 91", "2 link_0 gpu 99"],
            [["GPU-bbbb"], ["GPU-aaaa"], []],
            id="two behind switches, one linked to what is no device of ours",
        ),
    ],
)
def test_which_devices_have_an_nvlink_to_each_other(
    reader: Callable[..., Reader], state: Path, links: list[str], peers: list[list[str]]
) -> None:
    write(state, GPU, SECOND, THIRD, *links)
    assert [r["nvlink_peers"] for r in reader().read()["reports"]] == peers


def test_a_driver_that_cannot_tell_what_a_link_leads_to(
    reader: Callable[..., Reader], state: Path, tmp_path: Path
) -> None:
    write(state, GPU, SECOND, "0 link_0 gpu 2", "1 link_0 switch 9")
    reports = reader(folder=build(tmp_path, "-DOLD_DRIVER")).read()["reports"]
    assert [r["nvlink_peers"] for r in reports] == [["GPU-bbbb"], []]


def test_a_driver_without_a_compute_capability(reader: Callable[..., Reader], state: Path) -> None:
    write(state, GPU.replace("0 cc 9.0\n", ""))
    (report,) = reader().read()["reports"]
    assert (report["compute_capability"], report["healthy"]) == (None, True)


def test_a_driver_that_counts_its_reserve_as_used(
    reader: Callable[..., Reader], state: Path
) -> None:
    write(state, GPU.replace(f"used {10 * GIB}", f"used {11 * GIB}"))
    (report,) = reader().read()["reports"]
    assert (report["memory_total_bytes"], report["memory_used_bytes"]) == (79 * GIB, 10 * GIB)


def test_an_old_driver_without_the_new_symbols(
    reader: Callable[..., Reader], tmp_path: Path
) -> None:
    (report,) = reader(folder=build(tmp_path, "-DOLD_DRIVER")).read()["reports"]
    assert report["memory_total_bytes"] == 80 * GIB
    assert report["memory_used_bytes"] == 11 * GIB  # version 1 cannot tell the reserve apart
    assert report["temperature_c"] == 55.0
    assert report["healthy"]


def test_our_memory_is_not_foreign_and_is_measured_per_replica(
    reader: Callable[..., Reader], state: Path, request: pytest.FixtureRequest
) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    request.addfinalizer(sleeper.kill)
    ours, other, foreign = os.getpid(), sleeper.pid, 1
    write(
        state,
        GPU,
        SECOND,
        f"0 process {ours} {4 * GIB} compute",
        f"0 process {ours} {4 * GIB} graphics",  # listed twice, used once
        f"0 process {foreign} {3 * GIB} graphics",
        f"1 process {ours} {5 * GIB} compute",
        f"1 process {other} {2 * GIB} compute",
    )
    answer = reader().read({"a": [ours], "b": [other]})
    assert answer["replica_bytes"] == {"a": 9 * GIB, "b": 2 * GIB}
    assert [r["foreign_bytes"] for r in answer["reports"]] == [6 * GIB, 3 * GIB]
    assert [r["device_id"] for r in answer["reports"]] == ["GPU-aaaa", "GPU-bbbb"]


def test_a_foreign_process_counts_while_ours_has_not_yet_touched_the_device(
    reader: Callable[..., Reader], state: Path
) -> None:
    write(state, GPU, f"0 process {os.getppid()} {10 * GIB} compute")
    (report,) = reader().read({"starting": [os.getpid()]})["reports"]
    assert report["foreign_bytes"] == 10 * GIB


@pytest.mark.parametrize(
    "listing",
    [
        pytest.param("", id="no process is listed"),
        pytest.param(f"0 process {NO_SUCH_PID} {8 * GIB} compute", id="pids of another namespace"),
        pytest.param(f"0 process {os.getpid()} -1 compute", id="bytes not available"),
        pytest.param(
            "0 error nvmlDeviceGetComputeRunningProcesses_v3 3\n"
            "0 error nvmlDeviceGetGraphicsRunningProcesses_v3 3",
            id="not supported",
        ),
    ],
)
def test_where_processes_cannot_be_seen_ours_are_not_foreign(
    reader: Callable[..., Reader], state: Path, listing: str
) -> None:
    one = reader()
    write(state, GPU.replace(f"used {10 * GIB}", f"used {2 * GIB}"), listing)
    assert one.read()["reports"][0]["foreign_bytes"] == 2 * GIB
    write(state, GPU, listing)  # our engine has started: 8 GiB more
    answer = one.read({"a": [os.getpid()]})
    assert answer["reports"][0]["foreign_bytes"] == 2 * GIB
    assert answer["reports"][0]["memory_used_bytes"] == 10 * GIB
    assert answer["replica_bytes"] == {}  # unmeasured is not zero


@pytest.mark.parametrize(
    ("function", "figure"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetTotalEccErrors", "ecc_uncorrected"),
    ],
)
def test_a_failing_query_costs_one_figure(
    reader: Callable[..., Reader], state: Path, function: str, figure: str
) -> None:
    write(state, GPU, f"0 error {function} 3")
    (report,) = reader().read()["reports"]
    assert [key for key, value in report.items() if value is None] == [
        *(key for key in ("utilization", "power_w", "ecc_uncorrected") if key == figure),
        "xid",
        "unhealthy_reason",
    ]
    assert report["healthy"]
    assert report["memory_used_bytes"] == 10 * GIB


def test_memory_that_cannot_be_read_is_a_reason_and_keeps_the_last_figures(
    reader: Callable[..., Reader], state: Path
) -> None:
    one = reader()
    one.read()
    broken = [f"0 error nvmlDeviceGetMemoryInfo{v} 999" for v in ("", "_v2")]
    write(state, GPU, *broken)
    (report,) = one.read()["reports"]
    assert not report["healthy"]
    assert "memory cannot be read" in report["unhealthy_reason"]
    assert report["memory_total_bytes"] == 79 * GIB
    write(state, GPU)
    assert one.read()["reports"][0]["healthy"]


def test_a_lost_gpu_is_reported_and_the_other_still_read(
    reader: Callable[..., Reader], state: Path
) -> None:
    write(state, GPU, SECOND)
    one = reader()
    one.read()
    write(state, GPU.replace("util 42", "util 50"), SECOND, "1 error * 15")
    first, second = one.read()["reports"]
    assert first["healthy"]
    assert first["utilization"] == 0.5
    assert second["device_id"] == "GPU-bbbb"
    assert second["memory_total_bytes"] == 79 * GIB
    assert not second["healthy"]
    assert "lost" in second["unhealthy_reason"]


def test_a_gpu_already_lost_at_the_start_does_not_vanish(
    reader: Callable[..., Reader], state: Path
) -> None:
    write(state, GPU, SECOND, "1 error * 15")
    _, second = reader().read()["reports"]
    assert second["device_id"] == "nvml-index-1"
    assert second["memory_total_bytes"] == 0
    assert "lost" in second["unhealthy_reason"]


def test_a_critical_xid_condemns_the_device_and_an_application_error_does_not(
    reader: Callable[..., Reader], state: Path
) -> None:
    one = reader()
    write(state, GPU, "0 xid 1 31", "0 xid 2 13")
    (report,) = one.read()["reports"]
    assert (report["xid"], report["healthy"]) == (None, True)
    write(state, GPU, "0 xid 3 13", "0 xid 4 95", "0 xid 5 31")
    for _ in range(2):  # events are raised once; the verdict stays
        (report,) = one.read()["reports"]
        assert (report["xid"], report["healthy"]) == (95, False)
        assert report["unhealthy_reason"].startswith("XID 95:")


def test_a_gpu_without_events_is_still_read(reader: Callable[..., Reader], state: Path) -> None:
    write(state, GPU, "0 error nvmlDeviceRegisterEvents 3", "0 xid 1 79")
    (report,) = reader().read()["reports"]
    assert (report["xid"], report["healthy"]) == (None, True)


def test_only_ecc_errors_since_the_start_count(reader: Callable[..., Reader], state: Path) -> None:
    one = reader()
    assert one.read()["reports"][0]["healthy"]  # 2 were there before
    write(state, GPU.replace("ecc 2", "ecc 3"))
    (report,) = one.read()["reports"]
    assert (report["ecc_uncorrected"], report["healthy"]) == (3, False)
    assert report["unhealthy_reason"].startswith("1 uncorrectable ECC error")


def test_auto_takes_gpus_where_there_are_any(reader: Callable[..., Reader]) -> None:
    assert reader("auto").opened == {"kind": "nvml"}


def test_auto_without_gpus_is_the_hosts_ram(reader: Callable[..., Reader], state: Path) -> None:
    write(state, "")
    one = reader("auto")
    assert one.opened == {"kind": "cpu"}
    assert "finds no GPU" in one.close()


def test_auto_with_a_broken_driver_says_so(reader: Callable[..., Reader], state: Path) -> None:
    write(state, "init 18")
    one = reader("auto")
    assert one.opened == {"kind": "cpu"}
    assert "NVML does not start" in one.close()


def test_nvml_without_a_driver_is_refused_in_words(
    reader: Callable[..., Reader], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "libnvidia-ml.so.1").write_text("not a library")  # shadows a real one, if any
    message = reader(folder=empty).opened["error"]
    assert message.startswith("agent.devices = 'nvml': NVML does not start")
    assert "install the NVIDIA driver" in message
