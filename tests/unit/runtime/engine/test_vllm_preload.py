"""What vLLM's launches say about forking; no vLLM is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runtime.checkpoints.tiny_models import MAX_MODEL_LEN
from runtime.engine.contract import LaunchContext, Preload
from runtime.engine.select import get_engine
from runtime.wire.model_spec import ModelSpec

GIB = 2**30
VLLM = get_engine("vllm")


def context(tmp_path: Path, **fields: Any) -> LaunchContext:
    values: dict[str, Any] = {
        "replica_id": "r", "host": "127.0.0.1", "port": 1, "route_key": "ROUTE",
        "control_key": "CONTROL", "device_kind": "nvml", "device_ids": ("GPU-1",),
        "device_indexes": (0,), "device_bytes": 8 * GIB, "device_total_bytes": 80 * GIB,
        "model_path": str(tmp_path), "revision": None, "python": sys.executable,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    return LaunchContext(**(values | fields))


def preload_of(tmp_path: Path, **fields: object) -> Preload:
    spec = ModelSpec(name="m", source="m", engine_args={"max_model_len": MAX_MODEL_LEN})
    preload = VLLM.launch(spec, context(tmp_path, **fields)).preload
    assert preload is not None
    return preload


def test_replicas_on_other_devices_share_one_parent_and_it_knows_no_secret(tmp_path: Path) -> None:
    one = preload_of(tmp_path)
    two = preload_of(tmp_path, device_ids=("GPU-2",), port=2, route_key="X", control_key="Y")
    assert one == two
    assert not {"ROUTE", "CONTROL"} & set(one.env.values())
    assert "CUDA_VISIBLE_DEVICES" not in one.env


def test_what_is_prepared_ahead_is_what_a_local_model_asks_for(tmp_path: Path) -> None:
    ahead = VLLM.preload(sys.executable, str(tmp_path / "cache"), "nvml")
    assert ahead == preload_of(tmp_path)


def test_a_model_of_the_hub_needs_a_parent_of_its_own(tmp_path: Path) -> None:
    """huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
    hub = preload_of(tmp_path, model_path="org/name")
    assert hub != preload_of(tmp_path)
    assert "HF_HUB_OFFLINE" not in hub.env


def test_all_that_the_parent_has_is_in_the_replicas_environment(tmp_path: Path) -> None:
    spec = ModelSpec(name="m", source="m")
    launch = VLLM.launch(spec, context(tmp_path))
    assert launch.preload is not None
    assert launch.preload.env.items() <= launch.env.items()


def test_neither_simulated_devices_nor_the_stub_prepare_one(tmp_path: Path) -> None:
    assert VLLM.preload(sys.executable, str(tmp_path), "simulated") is None
    assert get_engine("stub").preload(sys.executable, str(tmp_path), "cpu") is None
