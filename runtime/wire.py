"""What the parts say to each other: frozen structs and their JSON codec.

Rules this file keeps:
- it imports nothing of ours, so that every part can import it;
- every message is full state or an idempotent command, never a delta;
- units are the last word of a name; times are ages (`..._s` ago), never wall-clock stamps of
  another host, since hosts' clocks differ.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

# Python's `$` also matches before a last newline: `(?!\n)` is what JSON Schema's `$` means.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$(?!\n)"
ALIAS_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,191}$(?!\n)"
ADAPTER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)"
REPLICA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # it names files and addresses

Bytes = Annotated[int, Meta(ge=0)]
Name = Annotated[
    str,
    Meta(
        pattern=NAME_PATTERN,
        description="1 to 96 letters, digits, '.', '_' or '-', the first a letter or digit",
    ),
]
Alias = Annotated[
    str,
    Meta(
        pattern=ALIAS_PATTERN,
        description="1 to 192 letters, digits or any of . _ : / @ -, the first a letter or digit",
    ),
]


AdapterName = Annotated[
    str,
    Meta(
        pattern=ADAPTER_PATTERN,
        description="1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
    ),
]


EnvName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Z_][A-Z0-9_]{0,127}$(?!\n)",
        description="1 to 128 capital letters, digits or '_', the first no digit",
    ),
]
HostName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$(?!\n)",
        description="a host in small letters, e.g. img.example.com",
    ),
]

# They name entries of the registry, and segments of the admin API's addresses.
NODE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,252}$(?!\n)"
NodeId = Annotated[
    str,
    Meta(
        pattern=NODE_PATTERN,
        description="letters, digits, '.', '_', ':' or '-', the first a letter or digit",
    ),
]
DeviceId = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._: -]{0,252}$(?!\n)",
        description="letters, digits, spaces, '.', '_', ':' or '-', the first a letter or digit",
    ),
]

Floor = Literal["hot", "asleep", "staged"]


class PrewarmWindow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From each time of `cron` on, for `for_s` seconds, the model stands at least on `rung`."""

    cron: Annotated[str, Meta(description="minute hour day month weekday, e.g. '0 8 * * 1-5'")]
    for_s: Annotated[float, Meta(gt=0, description="for how long, e.g. 36000 for ten hours")]
    timezone: Annotated[str, Meta(description="an IANA name, e.g. Europe/Berlin")] = "UTC"
    rung: Annotated[Floor, Meta(description="hot, asleep or staged")] = "hot"


class Prewarm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How warm a model is kept although nobody calls it."""

    min_warm: Annotated[
        Floor | None,
        Meta(description="hot, asleep or staged: never colder than this; left out: no limit"),
    ] = None
    schedule: Annotated[
        tuple[PrewarmWindow, ...], Meta(description="times at which to be warm already")
    ] = ()


class Placement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where replicas of a model may run."""

    labels: Annotated[
        dict[str, str], Meta(description="a node must have all of these labels, e.g. {zone: a}")
    ] = {}
    devices: Annotated[
        tuple[str, ...],
        Meta(description="a device's name must match one of these patterns, e.g. '*H100*'"),
    ] = ()
    min_compute_capability: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="of a GPU, e.g. 8.9; devices that do not tell theirs are left out"),
    ] = None
    spread: Annotated[
        Literal["prefer", "node", "off"],
        Meta(
            description="prefer: replicas on different nodes where there is room; node: never two"
            " on one node; off: not cared for"
        ),
    ] = "prefer"


ScaleMetric = Literal["queue_depth", "concurrency", "gpu_utilization", "kv_cache_usage", "ttft_p95"]


class ScaleTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure to hold, as a metric of Kubernetes' HorizontalPodAutoscaler."""

    metric: Annotated[
        ScaleMetric,
        Meta(
            description="queue_depth and concurrency: requests a replica; gpu_utilization and"
            " kv_cache_usage: 0 to 1; ttft_p95: seconds"
        ),
    ]
    target: Annotated[float, Meta(gt=0, description="the value to hold")]


class ScalePolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may change within a period: `value` per cent of the replicas, or so many."""

    type: Literal["percent", "count"]
    value: Annotated[float, Meta(gt=0)]
    period_s: Annotated[float, Meta(gt=0, le=1800)]


class ScaleRules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One direction's policies: the one that allows most counts."""

    policies: tuple[ScalePolicy, ...] = ()
    stabilization_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class Autoscale(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a model gets more replicas and when it gives some back.

    scheduler/signals/replica_target.py has the rules.
    """

    metrics: Annotated[
        tuple[ScaleTarget, ...],
        Meta(description="the largest wish counts; left out: concurrency at target_concurrency"),
    ] = ()
    up: ScaleRules = ScaleRules(
        policies=(ScalePolicy(type="percent", value=100, period_s=30.0),), stabilization_s=60.0
    )
    down: ScaleRules = ScaleRules(
        policies=(ScalePolicy(type="percent", value=50, period_s=60.0),), stabilization_s=300.0
    )
    panic_window_s: Annotated[
        float, Meta(ge=0, description="a burst is looked for within this; 0: never panic")
    ] = 6.0
    panic_threshold: Annotated[
        float, Meta(gt=1, description="panic at this many times what the ready replicas can take")
    ] = 2.0


class ResponseCaching(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a model's answers are kept to be given again."""

    ttl_s: Annotated[
        float, Meta(gt=0, le=2592000, description="how long an answer is given again")
    ] = 3600.0
    shared: Annotated[
        bool, Meta(description="a tenant may get the answer to another's request of the same words")
    ] = False


class Batching(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Calls that arrive one by one are sent to the engine together."""

    max_batch_size: Annotated[int, Meta(ge=2, le=1024, description="calls in one request")] = 32
    max_wait_ms: Annotated[
        float, Meta(gt=0, le=1000, description="how long the first of them waits for others")
    ] = 5.0
    endpoints: Annotated[
        tuple[Literal["embeddings", "completions"], ...],
        Meta(min_length=1, description="which calls; completions only where they are not streamed"),
    ] = ("embeddings",)


class ModelSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model as its owner declares it. `runtime.contract.spec_file` reads and checks it."""

    name: Annotated[Name, Meta(description="the model's name in every API")]
    source: Annotated[
        str,
        Meta(
            min_length=1,
            description="where the weights are: a local folder, hf:org/name[@revision] or s3://…",
        ),
    ]
    engine: Annotated[
        Literal["vllm", "stub"],
        Meta(description="vllm, or stub: a labelled stand-in with modelled timings"),
    ] = "vllm"
    aliases: Annotated[tuple[Alias, ...], Meta(description="other names that mean this model")] = ()
    adapters: Annotated[
        dict[AdapterName, str],
        Meta(
            description="LoRA adapters by name, each with its source (as the model's own): `sql` of"
            " model `m` is called as `m:sql`"
        ),
    ] = {}
    engine_args: Annotated[
        dict[str, Any],
        Meta(description="passed to the engine: `max_model_len: 4096` is --max-model-len 4096"),
    ] = {}
    env: Annotated[
        dict[EnvName, str],
        Meta(
            description="environment of the engine, e.g. NCCL_P2P_DISABLE: '1'; the node's"
            " agent.engine_env says which names it may get"
        ),
    ] = {}
    media_domains: Annotated[
        tuple[HostName, ...],
        Meta(
            max_length=64,
            description="hosts that images, video and audio of requests may be fetched from, as far"
            " as the node's agent.media_domains allows; left out: none, only data: URLs",
        ),
    ] = ()
    device_memory_bytes: Annotated[
        Annotated[int, Meta(gt=0)] | None,
        Meta(
            description="memory one replica books on its devices, all together, e.g. 12GiB;"
            " estimated from the model's files when left out"
        ),
    ] = None
    tensor_parallel_size: Annotated[
        int, Meta(ge=1, le=64, description="devices of one node that one replica spans")
    ] = 1
    min_replicas: Annotated[int, Meta(ge=0, le=1024, description="kept running even when idle")] = 0
    max_replicas: Annotated[int, Meta(ge=1, le=1024, description="never more than this")] = 1
    idle_s: Annotated[
        float, Meta(gt=0, description="seconds without a request before a replica steps down")
    ] = 300.0
    asleep_s: Annotated[
        float,
        Meta(gt=0, description="seconds a replica sleeps unused before it is stopped"),
    ] = 3600.0
    staged_s: Annotated[
        float,
        Meta(gt=0, description="seconds a stopped model's weights are kept in host memory"),
    ] = 21600.0
    sleep: Annotated[
        Literal["auto", "off"],
        Meta(description="auto: an idle or evicted replica sleeps where its engine can; or off"),
    ] = "auto"
    snapshot: Annotated[
        Literal["off", "auto"],
        Meta(
            description="auto: the engine's process image is kept on disk where the host allows it"
        ),
    ] = "off"
    placement: Annotated[Placement, Meta(description="where its replicas may run")] = Placement()
    autoscale: Annotated[
        Autoscale, Meta(description="how its number of replicas follows demand")
    ] = Autoscale()
    forecast: Annotated[
        Literal["auto", "off"],
        Meta(description="auto: warmed ahead of calls that its history lets expect; or off"),
    ] = "auto"
    prewarm: Annotated[
        Prewarm, Meta(description="how warm it is kept although nobody calls it")
    ] = Prewarm()
    priority: Annotated[
        int, Meta(ge=-100, le=100, description="higher is evicted later; 0 is usual")
    ] = 0
    hold_s: Annotated[
        float, Meta(gt=0, le=3600, description="how long a request may wait for a cold start")
    ] = 300.0
    target_concurrency: Annotated[
        int, Meta(ge=1, description="requests one replica should have in flight")
    ] = 16
    max_queue: Annotated[
        int, Meta(ge=1, description="requests that may wait at one router; more get 429")
    ] = 1024
    affinity: Annotated[
        Literal["prefix", "off"],
        Meta(
            description="prefix: calls of one session or beginning go to the replica that has read"
            " it before, unless that is busier than others; off: always the least loaded"
        ),
    ] = "prefix"

    response_cache: Annotated[
        ResponseCaching | None,
        Meta(
            description="answers to exact repeats are kept (embeddings; temperature 0 or a seed);"
            " left out: none are"
        ),
    ] = None

    batching: Annotated[
        Batching | None,
        Meta(description="calls that arrive one by one share a request to the engine; off"),
    ] = None

    hedge_after_ms: Annotated[
        Annotated[float, Meta(gt=0, le=60000)] | None,
        Meta(
            description="embeddings, scores and ranks that take longer are asked of a second"
            " replica too, within the retry budget; left out: never"
        ),
    ] = None

    def names(self) -> tuple[str, ...]:
        """The name and every alias."""
        return (self.name, *self.aliases)

    def adapter_names(self) -> tuple[str, ...]:
        """What callers name each adapter by: `name:adapter`."""
        return tuple(f"{self.name}:{adapter}" for adapter in self.adapters)

    def launch_key(self) -> str:
        """Twelve hex digits that change when a running replica no longer matches this spec.

        Only what the engine process is started with counts: changing `idle_s` restarts nothing, nor
        does another adapter, as long as the engine's own arguments have room for its rank.
        """
        launch = (
            self.name,
            self.aliases,
            self.source,
            self.engine,
            self.engine_args,
            self.env,
            self.media_domains,
            self.device_memory_bytes,
            self.tensor_parallel_size,
            self.sleep,
        )
        return hashlib.sha256(msgspec.json.encode(launch, order="sorted")).hexdigest()[:12]

    def booked_bytes(self) -> int:
        """Bytes one replica books on *each* of its devices, rounded up.

        Raises ValueError where the spec has neither a declared nor an estimated size; the
        scheduler's API fills the estimate in before a spec reaches the core.
        """
        if self.device_memory_bytes is None:
            raise ValueError(f"{self.name}: device_memory_bytes is neither declared nor estimated")
        return -(-self.device_memory_bytes // self.tensor_parallel_size)


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


class HeartbeatReply(Struct, frozen=True, kw_only=True):
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


ReplicaCommand = StartReplica | StopReplica | SleepReplica | WakeReplica
AgentCommand = ReplicaCommand | StageModels


class CommandReply(Struct, frozen=True, kw_only=True):
    """The agent's answer to one command."""

    ok: bool
    boot_id: int
    seq: int  # heartbeats from this one on show the command's effect
    error: str | None = None


class SpecProblem(Struct, frozen=True, kw_only=True):
    """One thing wrong with a spec or a config: the field, its value, and how to mend it."""

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


# ------------------------------------------------------------------------------ versions of a model

# Unknown fields are refused where a rule is read (runtime/contract/route_rules.py), not here: an
# older router must be able to read a newer scheduler's table.

SEMVER_PATTERN = (
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$(?!\n)"
)


class RouteTarget(Struct, frozen=True, kw_only=True):
    """One model behind a route, and its share: `weight` of the sum of all weights."""

    model: Annotated[Name, Meta(description="the name of a model")]
    weight: Annotated[float, Meta(ge=0, le=1e6, description="its part of the sum; 0: none")] = 1.0
    version: Annotated[
        Annotated[str, Meta(pattern=SEMVER_PATTERN)] | None,
        Meta(description="semantic version, e.g. 1.2.0: callers may ask for NAME@1.2.0 or NAME@1"),
    ] = None


class Mirror(Struct, frozen=True, kw_only=True):
    """A copy of so many requests goes to a model whose answers nobody sees."""

    model: Annotated[Name, Meta(description="the name of a model that is no target")]
    share: Annotated[float, Meta(gt=0, le=1, description="of the requests, e.g. 0.1")] = 1.0


class Canary(Struct, frozen=True, kw_only=True):
    """One target's share grows step by step, or goes back to nothing.

    scheduler/policy/route_canary.py has the rules.
    """

    model: Annotated[Name, Meta(description="the target that is tried")]
    steps: Annotated[
        tuple[Annotated[float, Meta(gt=0, lt=100)], ...],
        Meta(min_length=1, description="its share in per cent, growing, e.g. [5, 25, 50]"),
    ] = (5.0, 25.0, 50.0)
    interval_s: Annotated[float, Meta(gt=0, description="a step lasts at least so long")] = 300.0
    min_requests: Annotated[
        int, Meta(ge=1, description="a step has at least so many requests of it")
    ] = 50
    max_error_rate: Annotated[
        float, Meta(ge=0, lt=1, description="of answers that are 5xx or broken off, e.g. 0.02")
    ] = 0.02
    max_ttft_ratio: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="its mean TTFT by that of the other targets; null: not looked at"),
    ] = 1.5


class RouteRule(Struct, frozen=True, kw_only=True):
    """A name that stands for versions of a model. runtime/contract/route_rules.py checks it."""

    name: Annotated[Name, Meta(description="what callers ask for; no model's name or alias")]
    targets: Annotated[
        tuple[RouteTarget, ...], Meta(min_length=1, description="models, each with its weight")
    ]
    sticky: Annotated[
        str,
        Meta(
            pattern=r"^(off|user|header:[A-Za-z0-9-]+)$(?!\n)",
            description="who meets the same target each time: off, user (the body's), header:NAME",
        ),
    ] = "off"
    fallback: Annotated[
        tuple[Name, ...], Meta(description="models asked in turn where the target can't be had")
    ] = ()
    mirror: Annotated[Mirror | None, Meta(description="a model that gets copies")] = None
    canary: Annotated[Canary | None, Meta(description="a target that is being tried")] = None


# --------------------------------------------------------------------------- router <-> scheduler


class ModelDemand(Struct, frozen=True, kw_only=True):
    """What one router has for one model right now."""

    model: str
    waiting: int = 0
    background: int = 0  # of those that wait or are in flight: in no hurry at all
    in_flight: int = 0
    oldest_wait_s: float = 0.0
    idle_for_s: float | None = None  # since its last request arrived or ended; None: never
    arrived: int = 0  # requests since the router started: grows only
    first_token_s: float | None = None  # from routed to its first byte, of the last held request
    ttft_p95_s: float | None = None  # of the last minute's requests that were not held; None: none


class TargetCounts(Struct, frozen=True, kw_only=True):
    """One router's requests for one model by way of one route, since it started."""

    route: str
    model: str
    requests: int = 0  # answered by an engine, or ended with 5xx; hang-ups aside
    errors: int = 0  # of these: answered with 5xx, or broken off
    first_bytes: int = 0
    first_byte_s: float = 0.0  # from sent to the first byte of a body: the sum over these


class DemandReport(Struct, frozen=True, kw_only=True):
    """A router's whole demand. `routes_version` is the table it routes by now (its ack)."""

    router_id: str
    boot_id: int
    seq: int
    routes_version: int
    models: tuple[ModelDemand, ...] = ()
    in_flight: dict[str, int] = {}  # replica_id -> requests of this router
    # replica_id -> seconds since a request of this router was sent there or ended, 0 while one is
    # in flight; those of the last minute, and all of them to a leader that is told for the first
    # time. Exact at `sent_s`, by the router's steady clock.
    idle_s: dict[str, float] = {}
    sent_s: float | None = None
    targets: tuple[TargetCounts, ...] = ()


Warmth = Literal["hot", "starting", "asleep", "staged", "cold", "failed"]


class Endpoint(Struct, frozen=True, kw_only=True):
    """One replica that serves."""

    replica_id: str
    base_url: str
    key: str
    devices: int = 1  # that it runs on
    full: bool = False  # requests wait in its engine: it gets no more than it has


class CacheRule(Struct, frozen=True, kw_only=True):
    """How a model's answers are kept. `revision` changes with what its engine runs with."""

    ttl_s: float
    shared: bool
    revision: str


class ModelRoute(Struct, frozen=True, kw_only=True):
    """All that a router must know of one model."""

    name: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # names of its LoRA adapters, "name:adapter": routed alike
    root: str = ""  # the hub's name of it, for who wants its tokenizer; "": it has none
    max_model_len: int | None = None  # tokens, where that is known
    warmth: Warmth = "cold"
    endpoints: tuple[Endpoint, ...] = ()
    hold_s: float = 300.0
    max_queue: int = 1024
    refusal: str | None = None  # set: why no request can be served, and none is held
    refusal_final: bool = False  # waiting does not change it, only who runs the cluster
    retry_after_s: float | None = None
    waiting_for: str | None = None  # in words, shown to those who wait: "starting on gpu-1"
    eta_s: float | None = None
    failures: dict[str, str] = {}  # replica id -> why its engine died, until it serves again
    affinity: Literal["prefix", "off"] = "prefix"
    target_concurrency: int = 16
    cache: CacheRule | None = None
    batching: Batching | None = None
    hedge_after_s: float | None = None


class RouteTable(Struct, frozen=True, kw_only=True):
    """Where every model is served. `version` grows with every change, across leaders too."""

    version: int
    models: tuple[ModelRoute, ...]
    rules: tuple[RouteRule, ...] = ()
    lost: tuple[str, ...] = ()  # base URLs of engines on nodes that no longer report


# ------------------------------------------------------------------------------ codec


def encode(message: Struct) -> bytes:
    """A message as JSON bytes."""
    return msgspec.json.encode(message)
