"""The snapshot rung: whether vLLM could keep an engine's process image here, and its calls for it.

`vllm snapshot create|inspect|restore` of vLLM 0.32 needs, by its sources: Linux on x86_64, root,
criu with its CUDA plugin, cuda-checkpoint, nvidia-smi, one GPU (the same one, with the same driver,
kernel and packages, at the restore), a hub model at a full commit, and an HTTP server without
`--middleware` or an API key. The last rules it out for Stoker as it is: its guard is a middleware,
and a restored engine without one would be open to whoever reaches its port. So no start uses this
rung yet; what is missing is said, and a vLLM that allows a middleware is seen.

Rules this file keeps:
- detected, not assumed; a refusal names everything that is missing;
- never run for real: no host with a GPU and CRIU was at hand. Tests call stand-ins.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.engine.vllm import arguments
from runtime.wire.agent_messages import DeviceKind
from runtime.wire.model_spec import ModelSpec

RUNG = "snapshot"  # in ReplicaReport.disabled
_CHECK_S = 30.0
_COMMIT = re.compile(r"hf:[^@]+@[0-9a-f]{40}")
_CAP_SYS_ADMIN = 1 << 21
_FIND_VLLM = (
    "import importlib.util as u; s = u.find_spec('vllm');"
    " print(s.submodule_search_locations[0] if s else '')"
)


class SnapshotError(Exception):
    """A call failed; the message has vLLM's own last words."""


class Identity(Struct, frozen=True):
    """What `inspect` tells that a restore depends on."""

    vllm_version: str
    driver_version: str
    gpu_uuid: str
    artifact_bytes: int


def host_lacks(python: str, kind: DeviceKind, environ: Mapping[str, str]) -> tuple[str, ...]:
    """What this host lacks for any snapshot, in words; empty if nothing. Blocks for seconds."""
    path = environ.get("PATH")
    lacks = []
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        lacks.append(f"Linux on x86_64 (this is {platform.system()} on {platform.machine()})")
    if kind != "nvml":
        lacks.append(f"an NVIDIA GPU (this node's devices are {kind})")
    if not _is_privileged():
        lacks.append("root, or the capability CAP_SYS_ADMIN, for the agent")
    criu = shutil.which("criu", path=path)
    if criu is None:
        lacks.append("criu (install the package, version 4 or newer)")
    elif words := _criu_trouble(criu):
        lacks.append(f"a kernel that criu can work with (criu check: {words})")
    for command in ("cuda-checkpoint", "nvidia-smi"):
        if shutil.which(command, path=path) is None:
            lacks.append(f"{command} (of NVIDIA)")
    plugins = environ.get("CRIU_CUDA_PLUGIN_DIR", "")
    if not plugins or not (Path(plugins) / "cuda_plugin.so").is_file():
        lacks.append("criu's CUDA plugin (CRIU_CUDA_PLUGIN_DIR: the folder of cuda_plugin.so)")
    return (*lacks, *_engine_lacks(python))


def spec_lacks(spec: ModelSpec) -> tuple[str, ...]:
    """What a model's spec lacks for a snapshot, in words."""
    args = arguments.flat_args(spec.engine_args)
    lacks = []
    if spec.engine != "vllm":
        lacks.append(f"engine: vllm (it is {spec.engine})")
    if spec.tensor_parallel_size != 1:
        lacks.append(f"tensor_parallel_size: 1 (it is {spec.tensor_parallel_size})")
    if not _COMMIT.fullmatch(spec.source):
        lacks.append(f"a hub model at a full commit, hf:org/name@<40 digits> (it is {spec.source})")
    if any(name in args for name in ("speculative_config", "spec_method", "spec_model")):
        lacks.append("no speculative decoding")
    return tuple(lacks)


def refusal(spec: ModelSpec, lacks: tuple[str, ...]) -> str | None:
    """Why a replica of `spec` has no snapshot; None where it could have one, or none is wanted."""
    missing = (*lacks, *spec_lacks(spec))
    if spec.snapshot == "off" or not missing:
        return None
    return f"missing: {'; '.join(missing)}"


def _is_privileged() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & _CAP_SYS_ADMIN)
    return os.geteuid() == 0


def _criu_trouble(criu: str) -> str | None:
    try:
        done = subprocess.run([criu, "check"], capture_output=True, text=True, timeout=_CHECK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return (lines[-1] if lines else f"status {done.returncode}") if done.returncode else None


def _engine_lacks(python: str) -> tuple[str, ...]:
    try:
        # In "/", since `-c` puts the cwd first on sys.path.
        done = subprocess.run(
            [python, "-c", _FIND_VLLM], cwd="/", capture_output=True, text=True, timeout=_CHECK_S
        )
        found = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    command = Path(found) / "entrypoints" / "cli" / "snapshot.py"
    if not found or not command.is_file():
        return ("a vLLM with the command `vllm snapshot`",)
    if "args.middleware" in command.read_text(errors="replace"):
        return ("a vLLM whose snapshots allow a middleware: Stoker's guard is one",)
    return ()


# ------------------------------------------------------------------------------ vLLM's calls


def create(vllm: str, model: str, revision: str, args: list[str], folder: Path) -> Identity:
    """Start an engine, keep its image in `folder` (which must not exist), and end it.

    Blocks for as long as a start. Raises SnapshotError.
    """
    words = [model, "--revision", revision, *args, "--snapshot-dir", str(folder)]
    _run([vllm, "snapshot", "create", *words])
    return inspect(vllm, folder)


def inspect(vllm: str, folder: Path) -> Identity:
    """What a snapshot was made with. Raises SnapshotError."""
    try:
        return msgspec.json.decode(_run([vllm, "snapshot", "inspect", str(folder)]), type=Identity)
    except ValueError as error:
        raise SnapshotError(f"{folder}: its manifest can't be read: {error}") from None


def restore(vllm: str, folder: Path, host: str, port: int) -> None:
    """Have the engine serve again; returns once vLLM has seen the answer it had before.

    Raises SnapshotError.
    """
    _run([vllm, "snapshot", "restore", str(folder), "--host", host, "--port", str(port)])


def _run(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, cwd="/", capture_output=True, text=True)
    except OSError as error:
        raise SnapshotError(f"{argv[0]} can't be run: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else f"status {done.returncode}"
        raise SnapshotError(f"{' '.join(argv[1:3])}: {last}")
    return done.stdout
