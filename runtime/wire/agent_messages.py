"""What a node's agent and the scheduler say to each other. Pure."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from runtime.wire.model_spec import ModelSpec
from runtime.wire.names import DeviceId, NodeId

# ------------------------------------------------------------------------------ agent -> scheduler

DeviceKind = Literal["nvml", "cpu", "simulated"]

StartRung = Literal["snapshot", "staged", "cached", "remote"]  # what a start begins from

ReplicaPhase = Literal[
    "starting",  # the process runs, its health check has not passed yet
    "ready",  # serves
    "draining",  # told to stop, finishing what is in flight
    "stopping",  # signalled; held until its processes and its device memory are gone
    "sleeping",  # nothing in flight any more; giving its device memory back
    "asleep",  # its process lives, its device memory is given back
    "waking",  # taking its device memory again; its canary has not passed yet
    "backoff",  # it died; the agent will start it again after a pause
    "failed",  # it died and the agent gave up; kept until the scheduler says stop
]


class DeviceReport(Struct, frozen=True, kw_only=True):
    """One device as the node sees it now. A figure the device does not give is None."""

    device_id: DeviceId  # the NVML uuid, or "cpu:<node>", or a declared name
    index: int
    kind: DeviceKind
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    foreign_bytes: int = 0  # used by processes that are not this agent's replicas
    utilization: float | None = None  # 0..1
    temperature_c: float | None = None
    power_w: float | None = None
    ecc_uncorrected: int | None = None
    xid: int | None = None  # the last critical XID seen since the agent started
    compute_capability: float | None = None  # 9.0 of an H100
    nvlink_peers: tuple[str, ...] = ()  # ids of this node's devices it has an NVLink to
    healthy: bool = True
    unhealthy_reason: str | None = None


class ReplicaReport(Struct, frozen=True, kw_only=True):
    """One replica as its agent sees it now."""

    replica_id: str
    epoch: int
    model: str
    launch_key: str
    device_ids: tuple[str, ...]
    device_bytes: int  # booked on each device
    phase: ReplicaPhase
    phase_age_s: float
    base_url: str | None = None  # where routers reach it, e.g. http://10.0.0.5:40123
    key: str | None = None  # the per-engine secret for its /v1 routes
    in_flight: int = 0
    idle_for_s: float | None = None  # since its last request ended; None: it has had none
    restarts: int = 0
    reason: str | None = None  # in words: why it died, or why it stops
    died: str | None = None  # why it last died after having served; kept when it serves again
    exit_kind: str | None = None  # oom | bad_model | bad_argument | port_in_use | killed | hung …
    pid: int | None = None
    memory_used_bytes: int | None = None
    start_s: float | None = None  # how long the last start took, process start to ready
    started_from: StartRung = "cached"  # where its weights were when that start began
    wake_s: float | None = None  # how long the last wake took, canary included
    sleep_s: float | None = None  # how long the last sleep took, until the memory was seen free
    sleep_level: int = 0  # 1 or 2 while sleeping, asleep or waking
    residue_bytes: int = 0  # asleep: what it still holds on each device
    host_bytes: int = 0  # host memory of its processes now, the offloaded weights included
    phases: dict[str, float] = {}  # seconds of each phase of the last start or wake
    rungs: tuple[int, ...] = ()  # the sleep levels it can take
    disabled: dict[str, str] = {}  # "asleep-1" -> why that rung is not used for it any more
    kv_cache_usage: float | None = None  # 0..1, by the engine's own metrics
    engine_waiting: int | None = None  # requests in the engine's own queue
    engine: str = "vllm"
    engine_version: str | None = None
    # Engines with one shell key can be pointed at each other's models; None: this one can't be.
    shell_key: str | None = None


class CachedModel(Struct, frozen=True, kw_only=True):
    """One model whose files are on the node's disk."""

    source: str  # as specs name it
    disk_bytes: int
    resident_bytes: int = 0  # of its weights, in the page cache now
    snapshot: bool = False  # a process image of it is kept too


class Heartbeat(Struct, frozen=True, kw_only=True):
    """A node's whole truth, sent every second and at once when a replica changes phase."""

    node_id: NodeId
    boot_id: int  # grows with every start of the agent
    seq: int  # grows with every heartbeat of one boot
    address: str  # the agent's own HTTP base URL
    devices: tuple[DeviceReport, ...]
    replicas: tuple[ReplicaReport, ...]
    host_memory_total_bytes: int = 0
    host_memory_available_bytes: int = 0
    host_budget_bytes: int = 0  # host memory for sleeping engines and staged weights, together
    cached: tuple[CachedModel, ...] = ()
    staged: tuple[str, ...] = ()  # sources the agent was told to hold in the page cache
    preemptible: bool = False  # a spot machine: it may be taken away at short notice
    preempted_in_s: float | None = None  # it was told to go: so many seconds are left
    engines: dict[str, str] = {}  # engine -> version that this node can run
    labels: dict[str, str] = {}
    draining: bool = False  # the agent is shutting down: place nothing here
    version: str = ""
    epoch: int = 0  # the highest leader's term it has heard of; it obeys no lower one
    # Of launches whose canary is known here, and whose weights are on the disk: launch key -> shell
    # key. Only at these an engine of this node is ever pointed.
    shells: dict[str, str] = {}


class HeartbeatReply(Struct, frozen=True, kw_only=True):
    """The scheduler's answer to a heartbeat."""

    term: int  # the leader's epoch, so that an agent can fence an older one
    # Of models that have replicas on this node: adapter -> source, all that each has now.
    adapters: dict[str, dict[str, str]] = {}


# ------------------------------------------------------------------------------ scheduler -> agent


class StartReplica(Struct, frozen=True, kw_only=True, tag="start"):
    """Run one replica of `spec` on `device_ids`. Repeating it changes nothing."""

    replica_id: str
    epoch: int
    spec: ModelSpec
    device_ids: tuple[str, ...]
    device_bytes: int  # on each device
    reason: str
    cause: str = ""
    kv_bytes: int | None = None  # of the KV cache on each device; None: the engine finds out itself
    alone: bool = True  # nothing else may move memory on its devices while it starts


class StopReplica(Struct, frozen=True, kw_only=True, tag="stop"):
    """Let in-flight requests end within `grace_s`, then end it. An unknown replica is success."""

    replica_id: str
    epoch: int
    grace_s: float
    reason: str
    cause: str = ""


class SleepReplica(Struct, frozen=True, kw_only=True, tag="sleep"):
    """Let in-flight requests end within `grace_s`, then give its device memory back.

    Level 1 keeps the weights in host memory, level 2 drops them. Asleep already (at any level) is
    success; a replica that cannot sleep is an error, and it goes on serving.
    """

    replica_id: str
    epoch: int
    level: Literal[1, 2]
    grace_s: float
    reason: str
    cause: str = ""


class WakeReplica(Struct, frozen=True, kw_only=True, tag="wake"):
    """Take the device memory again and serve. Hot already is success."""

    replica_id: str
    epoch: int
    reason: str
    cause: str = ""


class RepointReplica(Struct, frozen=True, kw_only=True, tag="repoint"):
    """Have its engine, ready or asleep, serve `spec` instead, in the same process, on the same
    devices, with the same booking.

    In-flight requests end within `grace_s`; where they do not, it goes on serving what it served.
    Serving `spec` already is success. Where the engine fails at it, it is started again for `spec`.
    """

    replica_id: str
    epoch: int
    spec: ModelSpec
    grace_s: float
    reason: str
    cause: str = ""


class Staging(Struct, frozen=True, kw_only=True):
    """One model's weights to hold in the page cache."""

    source: str
    bytes: int  # booked for it; the agent reads no more


class StageModels(Struct, frozen=True, kw_only=True, tag="stage"):
    """Hold these models' weights in the page cache, and no others': the whole wish, every time."""

    epoch: int
    models: tuple[Staging, ...]
    reason: str = ""
    cause: str = ""


ReplicaCommand = StartReplica | StopReplica | SleepReplica | WakeReplica | RepointReplica
AgentCommand = ReplicaCommand | StageModels


class CommandReply(Struct, frozen=True, kw_only=True):
    """The agent's answer to one command."""

    ok: bool
    boot_id: int
    seq: int  # heartbeats from this one on show the command's effect
    error: str | None = None


class SpecProblem(Struct, frozen=True, kw_only=True):
    """One thing wrong with a spec or a config: the field, its value, and how to fix it."""

    field: str
    message: str
    value: Any = None
    fix: str | None = None

    def __str__(self) -> str:
        shown = "" if self.value is None else f" (got {self.value!r})"
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.field}: {self.message}{shown}{fix}"


class MemoryEstimate(Struct, frozen=True, kw_only=True):
    """What one replica is expected to take on its devices, all together."""

    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    total_bytes: int
    explanation: str
    adapters_bytes: int = 0  # LoRA slots
    max_model_len: int | None = None  # tokens of one sequence, as declared or by its config.json


class Inspection(Struct, frozen=True, kw_only=True):
    """A node's opinion of a spec: what is wrong with it there, and what it would take."""

    problems: tuple[SpecProblem, ...] = ()
    estimate: MemoryEstimate | None = None
    estimate_error: str | None = None
    checked_against: str | None = None  # e.g. "vllm 0.32.0 argument parser"
    lora_rank: int = 0  # the highest of its adapters; 0: none was read
    warnings: tuple[str, ...] = ()  # why its start will most likely fail
