"""How a model is run: the contract between an agent and one kind of engine.

An engine says what process to start and what its death meant; it starts nothing itself. The agent
owns the process.

Rules this package keeps:
- secrets go into the environment of a process, never into its arguments;
- what an engine is refused for is said before it is started, where it can be known;
- the package itself stays light: vLLM imports it too, for `guard`.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from runtime.wire.agent_messages import DeviceKind, SpecProblem
from runtime.wire.model_spec import ModelSpec

# What `explain_exit` may call the end of an engine.
EXIT_KINDS = (
    "oom",  # device or host memory did not suffice
    "bad_model",  # the weights or their config cannot be loaded
    "bad_argument",  # an engine argument was refused
    "too_small",  # what it was given is less than one request needs
    "port_in_use",
    "bad_host",  # the host lacks what the engine needs; another one may have it
    "killed",  # by a signal, or one of its processes was
    "crash",  # it failed in a way none of the above names
    "exited",  # it ended by itself with status 0
)


class Preload(Struct, frozen=True, kw_only=True):
    """What engines can share by being forked from a parent that imported it once."""

    module: str  # imported by `runtime.engine.fork_server`
    python: str
    env: dict[str, str]  # of the parent: all that importing the engine reads


class Launch(Struct, frozen=True, kw_only=True):
    """All an agent must know to run an engine's process."""

    argv: tuple[str, ...]
    env: dict[str, str]  # added to a clean base environment
    health_path: str  # GET answers 200 once the engine serves
    preload: Preload | None = None  # None: it is always started plainly


class LaunchContext(Struct, frozen=True, kw_only=True):
    """Where and with what one replica runs."""

    replica_id: str
    host: str  # the address to listen on
    port: int
    route_key: str  # the guard's secrets
    control_key: str
    device_kind: DeviceKind
    device_ids: tuple[str, ...]
    device_indexes: tuple[int, ...]
    device_bytes: int  # booked on each device
    device_total_bytes: int  # of one device
    model_path: str  # what to load: a local folder, a hub id or an s3:// address
    revision: str | None
    python: str  # the interpreter vLLM is installed in
    cache_dir: str  # node-local and kept: compile caches live below it
    load_format: str | None = None  # of the weights; None: the engine's own, or the spec's
    kv_bytes: int | None = None  # of the KV cache on each device; None: what is left of the booking
    adapter_index: str = ""  # the file of `adapter_index`, of a model that may have adapters


class AsleepModel(Struct, frozen=True, kw_only=True):
    """What a sleeping engine holds, where that is modelled and cannot be measured."""

    residue_bytes: int  # on each device
    host_bytes: int  # of host memory, more than its processes show


class Engine(Protocol):
    """One way to run a model."""

    @property
    def name(self) -> str:
        """As in `ModelSpec.engine`."""
        ...

    def launch(self, spec: ModelSpec, ctx: LaunchContext) -> Launch:
        """The process that serves `spec`. Raises ValueError where it can't be run there at all."""
        ...

    def preload(self, python: str, cache_dir: str, kind: DeviceKind) -> Preload | None:
        """What most launches on such devices will ask to be forked from; None: nothing."""
        ...

    def rungs(self, spec: ModelSpec, device_kind: DeviceKind) -> tuple[int, ...]:
        """The sleep levels that a replica launched from `spec` on such devices has."""
        ...

    def asleep_model(self, spec: ModelSpec, level: int) -> AsleepModel | None:
        """What it holds at that sleep level; None: measure it."""
        ...

    def shell_key(self, spec: ModelSpec, ctx: LaunchContext, version: str | None) -> str | None:
        """What a running engine must share with another model to be changed to it in place.

        Hex digits: of two launches that have the same, an engine of one can be changed to the
        other. None: never. `version`: of the engine on that node. May read the model's files.
        """
        ...

    def repoint(self, spec: ModelSpec, ctx: LaunchContext) -> dict[str, object]:
        """The JSON body of `guard.REPOINT_PATH` that changes a running engine to `spec`."""
        ...

    def explain_exit(self, returncode: int | None, log_tail: str) -> tuple[str, str]:
        """(one of EXIT_KINDS, the cause in words) of a process that ended."""
        ...

    def version(self, python: str) -> str | None:
        """The version that `python` can run; None if it has none. May take a second."""
        ...

    def check_args(
        self, spec: ModelSpec, python: str, cache_dir: str
    ) -> tuple[list[SpecProblem], str | None]:
        """What is wrong with `spec.engine_args`, and what they were checked against.

        ([], None) where there is nothing to check against. May take half a minute, once a version.
        """
        ...
