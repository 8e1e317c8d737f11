"""The stub as an engine: a labelled stand-in that answers like vLLM, with modelled timings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

import runtime
from runtime.engine import adapter_index, exits, guard
from runtime.engine.contract import AsleepModel, Launch, LaunchContext, Preload
from runtime.wire.agent_messages import DeviceKind, SpecProblem
from runtime.wire.model_spec import ModelSpec

Seconds = Annotated[float, Meta(ge=0, description="seconds, 0 or more")]
Bytes = Annotated[int, Meta(ge=0, description="a size, e.g. 2GiB")]
Count = Annotated[int, Meta(ge=1, description="a whole number, 1 or more")]


class StubArgs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`engine_args` of a model with `engine: stub`. It allocates no memory, whatever is booked."""

    start_s: Seconds = 0.2  # process start to ready
    ttft_s: Seconds = 0.01  # request to first token
    token_s: Seconds = 0.005  # between tokens
    max_tokens: Count = 16  # of a request that names none
    # An answer ends with the prompt's words, as a model ends by itself (finish_reason "stop").
    says_once: bool = False
    sleep_s: Seconds = 0.05
    wake_1_s: Seconds = 0.1  # from sleep level 1
    wake_2_s: Seconds = 0.3  # from sleep level 2, nearly all of it to reload the weights
    # Engines whose args are equal can be changed to each other's model, where this is not "".
    shell: str = ""
    repoint_s: Seconds = 0.04  # to change to another model
    kv_requests: Count = 64  # modelled: in flight, they fill the KV cache; more of them wait
    rungs: tuple[Literal[1, 2], ...] = (1, 2)  # the sleep levels it has
    residue_bytes: Bytes = 0  # modelled: held on each device while asleep
    host_bytes: Bytes = 0  # modelled: host memory of the weights, asleep at level 1
    # As vLLM's; every adapter that was asked for stays loaded, since none takes memory.
    enable_lora: bool = False
    max_loras: Count = 1
    max_lora_rank: Count = 16
    # Answer nonsense after every wake, not only after one in the wrong order.
    wake_gibberish: bool = False
    # Answer nonsense after every change to another model.
    repoint_gibberish: bool = False
    # Do not change to another model: "refused" before anything was touched, "half_way" after.
    fail_repoint: Literal["refused", "half_way"] | None = None
    # Instead of becoming ready, end as vLLM does when that happens.
    fail_start: Literal["oom", "bad_model", "crash"] | None = None
    # Answer that many requests; the next one ends the process.
    crash_after_requests: Count | None = None
    # Answer every so many-th request with status 500; 1: each.
    fail_every: Count | None = None


class StubEngine:
    """Runs `python -m runtime.engine.stub.server`."""

    name = "stub"

    def launch(self, spec: ModelSpec, ctx: LaunchContext) -> Launch:
        """The stub's process, in this interpreter. Raises SchemaError for bad `engine_args`."""
        args = _parse(spec)
        argv = (
            sys.executable, "-m", "runtime.engine.stub.server",
            "--host", ctx.host, "--port", str(ctx.port), "--names", *spec.names(),
            "--args", msgspec.json.encode(args).decode(),
            "--media-domains", *spec.media_domains,
        )  # fmt: skip
        env = {
            **spec.env,
            guard.ROUTE_KEY_ENV: ctx.route_key,
            guard.CONTROL_KEY_ENV: ctx.control_key,
            "PYTHONPATH": str(Path(runtime.__file__).parents[1]),
        }
        if ctx.adapter_index:
            env |= adapter_index.environment(ctx.adapter_index, args.max_lora_rank)
        return Launch(argv=argv, env=env, health_path="/health")

    def preload(self, python: str, cache_dir: str, kind: DeviceKind) -> Preload | None:
        """None: it imports little."""
        return None

    def rungs(self, spec: ModelSpec, device_kind: DeviceKind) -> tuple[int, ...]:
        """See `Engine`; it sleeps on any device, as it takes no memory of it."""
        return _parse(spec).rungs if spec.sleep == "auto" else ()

    def asleep_model(self, spec: ModelSpec, level: int) -> AsleepModel | None:
        """See `Engine`."""
        args = _parse(spec)
        host_bytes = args.host_bytes if level == 1 else 0
        return AsleepModel(residue_bytes=args.residue_bytes, host_bytes=host_bytes)

    def shell_key(self, spec: ModelSpec, ctx: LaunchContext, version: str | None) -> str | None:
        """See `Engine`; only where `engine_args.shell` is set. It has no files that matter."""
        args = _parse(spec)
        if not args.shell or args.enable_lora or spec.adapters:
            return None
        kept = (
            self.name, version, args, spec.env, spec.media_domains, spec.sleep,
            spec.tensor_parallel_size, ctx.device_kind, ctx.device_bytes, ctx.kv_bytes,
        )  # fmt: skip
        return hashlib.sha256(msgspec.json.encode(kept, order="sorted")).hexdigest()

    def repoint(self, spec: ModelSpec, ctx: LaunchContext) -> dict[str, object]:
        """See `Engine`."""
        return guard.Repoint(ctx.model_path, spec.names(), ctx.route_key)._asdict()

    def explain_exit(self, returncode: int | None, log_tail: str) -> tuple[str, str]:
        """See `Engine`; a modelled failure is logged in vLLM's words."""
        return exits.explain(returncode, log_tail)

    def version(self, python: str) -> str | None:
        """Stoker's own version: the stub is always there."""
        return _version()

    def check_args(
        self, spec: ModelSpec, python: str, cache_dir: str
    ) -> tuple[list[SpecProblem], str | None]:
        """See `Engine`."""
        from runtime.contract.schema import SchemaError  # not needed by the stub's own process

        problems: list[SpecProblem] = []
        try:
            _parse(spec)
        except SchemaError as error:
            problems = [
                msgspec.structs.replace(p, field=f"engine_args.{p.field}") for p in error.problems
            ]
        return problems, f"stub {_version()}"


def _parse(spec: ModelSpec) -> StubArgs:
    from runtime.contract.schema import check

    return check(spec.engine_args, StubArgs, spec.name)


def _version() -> str:
    try:
        return importlib.metadata.version("stoker-serve")
    except importlib.metadata.PackageNotFoundError:
        return "0"
