"""What the admin API shows: read-only answers, made from a snapshot of the state.

The OpenAPI document and the CLI are built from these structs, so a field exists once.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from runtime.wire.agent_messages import DeviceReport, MemoryEstimate, SpecProblem
from runtime.wire.model_spec import ModelSpec
from runtime.wire.names import Floor
from runtime.wire.routes import Warmth

ReplicaState = Literal[
    "planned",  # placed; waits for its victims to leave or for its turn on the device
    "starting",
    "ready",
    "draining",  # unrouted, or told to stop, and finishing what is in flight
    "sleeping",
    "asleep",
    "waking",
    "stopping",
    "backoff",
    "failed",
    "unknown",  # its node does not report
]


class ModelView(Struct, frozen=True, kw_only=True):
    """One model and where it stands."""

    name: str
    spec: ModelSpec
    warmth: Warmth
    device_memory_bytes: int  # what one replica books, all devices together
    memory_from: Literal["declared", "estimated"]
    estimate: MemoryEstimate | None = None
    wanted: int = 0  # replicas wanted now
    wanted_why: str = ""
    replicas: int = 0
    ready: int = 0
    waiting: int = 0  # requests held for it, all routers together
    in_flight: int = 0
    pinned: bool = False
    floor: Floor | None = None  # by schedule or on request it may not be colder than this
    idle_for_s: float | None = None
    problem: str | None = None  # why it can't run now
    retry_after_s: float | None = None


class ReplicaView(Struct, frozen=True, kw_only=True):
    """One replica."""

    replica_id: str
    model: str
    node_id: str
    device_ids: tuple[str, ...]
    device_bytes: int  # booked on each device
    state: ReplicaState
    since_s: float  # in this state
    in_flight: int = 0
    idle_for_s: float | None = None
    restarts: int = 0
    reason: str | None = None
    died: str | None = None  # why it last died after having served
    start_s: float | None = None
    wake_s: float | None = None
    sleep_level: int = 0  # 1 or 2: on its way to sleep, asleep or waking
    residue_bytes: int = 0  # asleep: kept on each device
    host_bytes: int = 0  # host memory booked for its sleep
    disabled: dict[str, str] = {}  # rungs it may not use any more, and why
    pid: int | None = None
    memory_used_bytes: int | None = None
    outdated: bool = False  # started with an older spec
    engine: str = ""
    engine_version: str | None = None


class DeviceView(Struct, frozen=True, kw_only=True):
    """One device: what is measured, and what Stoker has booked on it."""

    node_id: str
    report: DeviceReport
    booked_bytes: int
    free_bytes: int  # what a new replica may still book
    replicas: tuple[str, ...]
    quarantined: str | None = None  # why it is set aside


class NodeView(Struct, frozen=True, kw_only=True):
    """One host."""

    node_id: str
    address: str
    state: Literal["ready", "cordoned", "draining", "preempted", "lost"]
    last_heartbeat_s: float
    devices: int
    replicas: int
    memory_total_bytes: int
    memory_booked_bytes: int
    host_memory_total_bytes: int
    host_memory_available_bytes: int
    host_budget_bytes: int  # for sleeping engines
    host_booked_bytes: int
    engines: dict[str, str]
    labels: dict[str, str]
    version: str
    staged: tuple[str, ...] = ()  # models whose weights it holds in its page cache
    shells: tuple[str, ...] = ()  # models that another model's engine there may be pointed at
    preemptible: bool = False
    preempted_in_s: float | None = None  # it is being taken away


class QueueView(Struct, frozen=True, kw_only=True):
    """Requests that wait for one model."""

    model: str
    waiting: int
    in_flight: int
    oldest_wait_s: float
    waiting_for: str | None


class DecisionView(Struct, frozen=True, kw_only=True):
    """One thing the scheduler decided, and why."""

    number: int
    age_s: float
    action: str  # start | stop | evict | refuse | give_up | …
    model: str
    replica_id: str | None
    node_id: str | None
    reason: str
    cause: str
    considered: tuple[str, ...] = ()  # a placement's runners-up, with their prices


class ColdStartView(Struct, frozen=True, kw_only=True):
    """The post-mortem of one climb to hot."""

    number: int
    age_s: float
    model: str
    replica_id: str
    node_id: str
    rung: str  # climbed from: remote | cached | staged | snapshot | asleep-2 | asleep-1
    outcome: str  # ready | failed
    cause: str
    reason: str
    moved_down: tuple[str, ...]
    total_s: float
    phases: dict[str, float]  # seconds; they add up to total_s
    after: dict[str, float] = {}  # seconds of what came once it served: canary, first_token
    expected_s: float | None = None  # what placement counted on
    considered: tuple[str, ...] = ()


class ColdStarts(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/coldstarts."""

    cold_starts: tuple[ColdStartView, ...]


class StepTimes(Struct, frozen=True, kw_only=True):
    """The seconds of one step or phase of it."""

    count: int
    p50_s: float
    p95_s: float
    last_s: float


class FootprintView(Struct, frozen=True, kw_only=True):
    """What one kind of replica was measured to take."""

    launch_key: str
    engine: str
    engine_version: str
    device_kind: str
    current: bool  # of the spec as it is now
    device_bytes: int | None
    residue_bytes: int | None
    host_bytes: int | None
    host_asleep_bytes: int | None
    times: dict[str, StepTimes]


class Footprints(Struct, frozen=True, kw_only=True):
    """Declared, estimated, measured."""

    model: str
    declared_bytes: int | None
    estimate: MemoryEstimate | None
    booked_bytes: int  # what placement uses, all devices together
    margin: float  # the share that is added to a measured size
    booked_from: str
    measured: tuple[FootprintView, ...]


class Models(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/models."""

    models: tuple[ModelView, ...]


class Replicas(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/replicas."""

    replicas: tuple[ReplicaView, ...]


class Nodes(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/nodes."""

    nodes: tuple[NodeView, ...]


class Devices(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/devices."""

    devices: tuple[DeviceView, ...]


class Queue(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/queue."""

    queue: tuple[QueueView, ...]


class Decisions(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/decisions."""

    decisions: tuple[DecisionView, ...]


class Health(Struct, frozen=True, kw_only=True):
    """How this scheduler is: `recovering` until it knows its nodes."""

    status: Literal["ok", "recovering", "standby"]
    leader: bool
    term: int
    nodes: int
    models: int
    version: str


class Saved(Struct, frozen=True, kw_only=True):
    """The answer to adding or changing a model."""

    created: bool
    model: ModelView
    changed: bool = True  # false: it was there, just so
    checked_against: str | None = None  # e.g. "vllm 0.32.0 argument parser"; None: not checked
    notes: tuple[str, ...] = ()


class ErrorBody(Struct, frozen=True, kw_only=True):
    """What is wrong: a sentence, and each wrong field."""

    message: str
    problems: tuple[SpecProblem, ...] = ()
    close: tuple[str, ...] = ()  # known names that may have been meant
    leader: str | None = None


class Error(Struct, frozen=True, kw_only=True):
    """The answer to a request that failed."""

    error: ErrorBody


class LoadBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /admin/models/{name}/load."""

    replicas: int = 1


class PrewarmBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Be on `rung` by a time, and stay for a while."""

    rung: Floor = "hot"
    by: str | None = None  # ISO 8601 with a time zone; left out: now
    for_s: float = 3600.0


class DrainBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models serve elsewhere first; what could not move by then stops."""

    deadline_s: float = 300.0


class QuarantineBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a device is set aside."""

    reason: str = "set aside by an operator"


class PlanBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question, or several at once: what would happen if …"""

    add: ModelSpec | None = None  # this model were added and loaded
    load: str | None = None  # this model had `replicas` replicas
    replicas: int = 1
    remove_node: str | None = None  # this node were drained and gone


class PlanStep(Struct, frozen=True, kw_only=True):
    """One thing the scheduler would decide."""

    action: str
    model: str
    replica_id: str | None
    node_id: str | None
    device_ids: tuple[str, ...]
    device_bytes: int | None
    goes_to: str | None  # of what goes down: asleep-1 | asleep-2 | stopped
    reason: str
    considered: tuple[str, ...]


class Plan(Struct, frozen=True, kw_only=True):
    """What would be decided at once; nothing was changed."""

    steps: tuple[PlanStep, ...]
    expected_wait_s: dict[str, float]  # replica -> seconds until it would serve
    not_placed: dict[str, str]  # model -> why not, and what would have to change


class PinBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /admin/models/{name}/pin."""

    pinned: bool
