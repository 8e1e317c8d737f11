"""Which engine has which rungs where, what a sleeper holds, and what a node remembers of it."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from agent.core.messages import Saved
from agent.devices.device_watch import DeviceWatch
from agent.devices.inventory import open_devices
from agent.engines.sleep_tasks import levels, residue_bytes
from agent.engines.wake_canary import WakeCanary
from agent.records import KEPT_DISABLED, Record, Records
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.agent_messages import StartReplica
from runtime.wire.model_spec import ModelSpec

GIB = 2**30
VLLM = ModelSpec(name="m", source="x", device_memory_bytes=GIB)
STUB = ModelSpec(name="m", source="x", engine="stub", device_memory_bytes=GIB)


def replace(spec, **fields):
    return msgspec.structs.replace(spec, **fields)


@pytest.mark.parametrize(
    ("spec", "kind", "expected"),
    [
        (VLLM, "nvml", (1, 2)),
        (VLLM, "cpu", ()),
        (VLLM, "simulated", ()),
        (replace(VLLM, sleep="off"), "nvml", ()),
        (replace(VLLM, engine_args={"enable-sleep-mode": False}), "nvml", ()),
        (STUB, "simulated", (1, 2)),
        (STUB, "cpu", (1, 2)),
        (replace(STUB, engine_args={"rungs": [1]}), "simulated", (1,)),
        (replace(STUB, engine_args={"rungs": []}), "simulated", ()),
        (replace(STUB, sleep="off"), "simulated", ()),
        (replace(STUB, engine_args={"no_such": 1}), "simulated", ()),
    ],
)
def test_the_rungs_of_an_engine(spec, kind, expected):
    assert levels(spec, kind) == expected


@pytest.mark.parametrize("sleep", ["auto", "off"])
def test_vllm_is_launched_with_sleep_mode_where_it_may_sleep(tmp_path, sleep):
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=1, route_key="a", control_key="b",
        device_kind="nvml", device_ids=("GPU-a",), device_indexes=(0,), device_bytes=20 * GIB,
        device_total_bytes=80 * GIB, model_path="org/name", revision=None, python=sys.executable,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    launch = get_engine("vllm").launch(replace(VLLM, sleep=sleep), ctx)
    assert ("--enable-sleep-mode" in launch.argv) == (sleep == "auto")
    assert launch.env.get("VLLM_SERVER_DEV_MODE") == ("1" if sleep == "auto" else None)


def test_residue_is_modelled_or_measured_on_each_device():
    stub = replace(STUB, engine_args={"residue_bytes": "1GiB", "host_bytes": "4GiB"})

    def command(spec):
        return StartReplica(
            replica_id="r", epoch=1, spec=spec, device_ids=("a", "b"), device_bytes=1, reason=""
        )

    assert residue_bytes(command(stub), 1, 0) == GIB
    assert residue_bytes(command(VLLM), 1, 3 * GIB + 1) == 3 * GIB // 2 + 1
    held = {level: get_engine("stub").asleep_model(stub, level).host_bytes for level in (1, 2)}
    assert held == {1: 4 * GIB, 2: 0}


@pytest.mark.parametrize("devices", ["simulated:1x1GiB", "cpu:1GiB"])
async def test_the_host_memory_of_a_replica_is_that_of_its_processes(devices):
    code = "held = bytearray(64 * 2**20); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"held\n"

        async def pids():
            return {"r": {child.pid}, "gone": {2**22 + os.getpid()}}

        watch = DeviceWatch(open_devices(devices, "n"), pids)
        await watch.read()
        child.stdin.close()
    assert 64 * 2**20 < watch.host_bytes("r") < 2 * GIB
    assert watch.host_bytes("gone") == watch.host_bytes("unknown") == 0


def test_disabled_rungs_and_canaries_outlive_the_agent(tmp_path):
    folder = str(tmp_path)
    records = Records(folder)
    assert records.disabled() == {}
    many = {f"m-{n}/key": {"asleep-1": f"words {n}"} for n in range(KEPT_DISABLED + 10)}
    records.save_disabled(many)
    known = WakeCanary(
        path="/v1/completions", body={"prompt": "x"}, token="y", logprobs={"y": -1.0}
    )
    start = StartReplica(
        replica_id="r", epoch=1, spec=STUB, device_ids=("a",), device_bytes=1, reason=""
    )
    records.save(Record(saved=Saved(command=start, phase="ready"), canary=known))
    records.close()
    successor = Records(folder)
    assert successor.disabled() == dict(list(many.items())[10:])
    assert [record.canary for record in successor.load()] == [known]
    successor.close()
