"""What the snapshot rung lacks here, and its calls.

`criu`, `vllm` and the rest are STAND-INS here, shell scripts that record how they were called: a
real snapshot needs root, CRIU and an NVIDIA GPU, and was never made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import msgspec
import pytest

from agent.engines import process_snapshot
from agent.engines.process_snapshot import Identity, SnapshotError
from runtime.wire.model_spec import ModelSpec

COMMIT = "0123456789" * 4
SPEC = ModelSpec(name="m", source=f"hf:org/name@{COMMIT}", device_memory_bytes=1, snapshot="auto")
MANIFEST = {
    "vllm_version": "0.32.0", "driver_version": "580.1", "gpu_uuid": "GPU-a",
    "artifact_bytes": 12, "more": "that nobody reads",
}  # fmt: skip


def script(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def host(tmp_path):
    """(environment, interpreter) of a host that has all there is to have"""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("criu", "cuda-checkpoint", "nvidia-smi"):
        script(tools, name, "exit 0")
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "cuda_plugin.so").touch()
    command = tmp_path / "site" / "vllm" / "entrypoints" / "cli"
    command.mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").touch()
    (command / "snapshot.py").write_text("# takes a middleware\n")
    python = script(tools, "python", f'PYTHONPATH={tmp_path}/site exec {sys.executable} "$@"')
    return {"PATH": str(tools), "CRIU_CUDA_PLUGIN_DIR": str(plugins)}, python


def test_a_host_that_has_it_all_lacks_nothing(host):
    environ, python = host
    lacks = process_snapshot.host_lacks(python, "nvml", environ)
    if os.geteuid() != 0:
        assert lacks == ("root, or the capability CAP_SYS_ADMIN, for the agent",)
    else:
        assert lacks == ()
        assert process_snapshot.refusal(SPEC, lacks) is None


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    lacks = process_snapshot.host_lacks(str(tmp_path / "python"), "cpu", {"PATH": str(tmp_path)})
    spec = msgspec.structs.replace(SPEC, tensor_parallel_size=2, source="/models/m")
    words = process_snapshot.refusal(spec, lacks) or ""
    for part in (
        "NVIDIA GPU", "criu (install", "cuda-checkpoint", "nvidia-smi", "CRIU_CUDA_PLUGIN_DIR",
        "`vllm snapshot`", "tensor_parallel_size: 1", "full commit",
    ):  # fmt: skip
        assert part in words
    assert process_snapshot.refusal(msgspec.structs.replace(spec, snapshot="off"), lacks) is None


def test_a_kernel_that_criu_refuses_is_said_in_its_words(host, tmp_path):
    environ, python = host
    script(tmp_path / "bin", "criu", "echo 'Error: ptrace is not allowed' >&2; exit 1")
    (words,) = [
        w for w in process_snapshot.host_lacks(python, "nvml", environ) if "criu check" in w
    ]
    assert "ptrace is not allowed" in words


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed")
def test_the_installed_vllm_refuses_the_guard(host):
    environ, _ = host
    lacks = process_snapshot.host_lacks(sys.executable, "nvml", environ)
    assert any("Stoker's guard" in words for words in lacks)


# ------------------------------------------------------------------------------ its calls


@pytest.fixture
def vllm(tmp_path):
    """A stand-in for `vllm`: writes down its arguments, and has one manifest for everything."""
    manifest = tmp_path / "manifest"
    manifest.write_text(json.dumps(MANIFEST))
    body = f'echo "$@" >> {tmp_path}/calls\n[ "$2" = inspect ] && cat {manifest}; exit 0'
    return script(tmp_path, "vllm", body)


def test_create_inspect_and_restore_say_what_vllm_expects(tmp_path, vllm):
    folder = tmp_path / "image"
    made = process_snapshot.create(vllm, "org/name", COMMIT, ["--max-model-len", "8"], folder)
    assert made == Identity("0.32.0", "580.1", "GPU-a", 12)
    process_snapshot.restore(vllm, folder, "127.0.0.1", 8123)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"snapshot create org/name --revision {COMMIT} --max-model-len 8 --snapshot-dir {folder}",
        f"snapshot inspect {folder}",
        f"snapshot restore {folder} --host 127.0.0.1 --port 8123",
    ]


def test_a_call_that_fails_says_vllms_last_words(tmp_path):
    bad = script(tmp_path, "vllm", "echo 'snapshot mismatch: driver_version' >&2; exit 1")
    with pytest.raises(SnapshotError, match="snapshot restore: snapshot mismatch: driver_version"):
        process_snapshot.restore(bad, tmp_path / "image", "127.0.0.1", 1)
    odd = script(tmp_path, "odd", "echo '{}'")
    with pytest.raises(SnapshotError, match="manifest can't be read"):
        process_snapshot.inspect(odd, tmp_path / "image")
    with pytest.raises(SnapshotError, match="can't be run"):
        process_snapshot.inspect(str(tmp_path / "none"), tmp_path / "image")
