"""What the scheduler's core is told, and what it answers.

Rules this file keeps: an event carries `now` (seconds of one monotonic clock); a command carries
`reason` and `cause`, so that every decision can be explained.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from runtime.contract.adapters import with_lora_args
from runtime.contract.footprint_ledger import Footprint
from runtime.wire.agent_messages import AgentCommand, Heartbeat, MemoryEstimate
from runtime.wire.model_spec import ModelSpec
from runtime.wire.names import Floor
from runtime.wire.routes import DemandReport, RouteRule, RouteTable
from scheduler.signals.forecast import StoredArrivals


class StoredModel(Struct, frozen=True, kw_only=True):
    """A model as the registry keeps it: the spec as declared, and the estimate made for it."""

    spec: ModelSpec
    estimate: MemoryEstimate | None = None
    lora_rank: int = 0  # the highest that its adapters had since it has any

    def after(self, before: StoredModel | None) -> StoredModel:
        """In place of `before`: an adapter that goes leaves its engines' room for its rank."""
        if before is None or not (self.spec.adapters and before.spec.adapters):
            return self
        return replace(self, lora_rank=max(self.lora_rank, before.lora_rank))

    def effective(self) -> ModelSpec:
        """The spec with the estimate filled in where no size was declared, and what its engine
        needs for adapters."""
        spec = with_lora_args(self.spec, self.lora_rank)
        if spec.device_memory_bytes is not None or self.estimate is None:
            return spec
        return replace(spec, device_memory_bytes=self.estimate.total_bytes)


# ------------------------------------------------------------------------------------- events


class Elected(Struct, frozen=True, kw_only=True):
    """A scheduler's own election. `known_nodes` are those the registry knows to be alive."""

    now: float
    term: int
    models: tuple[StoredModel, ...] = ()
    known_nodes: tuple[str, ...] = ()
    cordoned: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    footprints: tuple[Footprint, ...] = ()
    quarantined: tuple[tuple[str, str, str], ...] = ()  # (node, device, reason)
    sketches: dict[str, StoredArrivals] = {}  # model -> when it was called
    rules: tuple[RouteRule, ...] = ()
    wall_s: float | None = None  # unix time at `now`; None: `now` is unix time


class HeartbeatSeen(Struct, frozen=True, kw_only=True):
    """A node's report."""

    now: float
    heartbeat: Heartbeat


class DemandSeen(Struct, frozen=True, kw_only=True):
    """A router's report."""

    now: float
    report: DemandReport


class ModelPut(Struct, frozen=True, kw_only=True):
    """A model that was added or changed."""

    now: float
    model: StoredModel


class ModelRemoved(Struct, frozen=True, kw_only=True):
    """A model that an operator removed."""

    now: float
    name: str


class LoadAsked(Struct, frozen=True, kw_only=True):
    """An operator's request to start replicas of a model."""

    now: float
    model: str
    replicas: int = 1


class UnloadAsked(Struct, frozen=True, kw_only=True):
    """Stop one replica, or (no replica_id) all of the model's."""

    now: float
    model: str
    replica_id: str | None = None


class PinSet(Struct, frozen=True, kw_only=True):
    """An operator's pin of a model, or its end."""

    now: float
    model: str
    pinned: bool


class FloorSet(Struct, frozen=True, kw_only=True):
    """From now on the model may not be colder than `floor`; None: it may."""

    now: float
    model: str
    floor: Floor | None


class CordonSet(Struct, frozen=True, kw_only=True):
    """Place nothing on the node (and with `drain` move off what it runs), or lift that.

    What could not move within `deadline_s` stops without a successor.
    """

    now: float
    node_id: str
    cordoned: bool
    drain: bool = False
    deadline_s: float = 300.0


class QuarantineSet(Struct, frozen=True, kw_only=True):
    """Use a device no more because of `reason`; None: use it again."""

    now: float
    node_id: str
    device_id: str
    reason: str | None


class RulesSet(Struct, frozen=True, kw_only=True):
    """Routers go by these rules, and no others, from now on."""

    now: float
    rules: tuple[RouteRule, ...]


class CommandDone(Struct, frozen=True, kw_only=True):
    """How the sending of a command ended. Unreachable agents give `delivered=False`."""

    now: float
    node_id: str
    replica_id: str
    kind: str  # start | stop | sleep | wake | repoint | stage
    delivered: bool
    ok: bool = False
    error: str | None = None
    boot_id: int = 0
    seq: int = 0


TICK_S = 0.5  # between two Ticks


class Tick(Struct, frozen=True, kw_only=True):
    """The passing of time."""

    now: float


Event = (
    Elected
    | HeartbeatSeen
    | DemandSeen
    | ModelPut
    | ModelRemoved
    | LoadAsked
    | UnloadAsked
    | PinSet
    | FloorSet
    | CordonSet
    | QuarantineSet
    | RulesSet
    | CommandDone
    | Tick
)

# ------------------------------------------------------------------------------------- commands


class Send(Struct, frozen=True, kw_only=True):
    """Have `node_id`'s agent do this; answer with CommandDone."""

    node_id: str
    command: AgentCommand


class Publish(Struct, frozen=True, kw_only=True):
    """Routers route by this table from now on."""

    table: RouteTable


class Decided(Struct, frozen=True, kw_only=True):
    """A record of one decision, for the log, the API and the metrics."""

    number: int
    at: float
    action: str
    model: str
    reason: str
    cause: str = ""
    replica_id: str | None = None
    node_id: str | None = None
    considered: tuple[str, ...] = ()  # a placement's runners-up, with their prices


class Quarantined(Struct, frozen=True, kw_only=True):
    """Keep that a device is not used, and why; None: it is used again."""

    node_id: str
    device_id: str
    reason: str | None


class ColdStart(Struct, frozen=True, kw_only=True):
    """The post-mortem of one climb to hot: why, what it moved down, and where the time went.

    `phases` are seconds: `queue` (the longest wait before it was planned), `evict` (until what was
    moved down for it had left), `turn` (until its devices were free of other starts and wakes, and
    of what left on its own), then what its agent reports (fork, import, weights, kv, …), with
    `other` for what no phase accounts for. They add up to `total_s` (`ledger.mismatch`).
    `after` is what came once it served: the `canary` of a start, and `first_token`.
    """

    number: int
    at: float
    model: str
    replica_id: str
    node_id: str
    # the one it climbed from: remote | cached | staged | snapshot | shell | asleep-2 | asleep-1
    rung: str
    outcome: str  # ready | failed
    cause: str
    reason: str
    moved_down: tuple[str, ...]  # "b-1-2 (b) to asleep-1"
    total_s: float
    phases: dict[str, float]
    after: dict[str, float] = {}
    expected_s: float | None = None  # what placement counted on
    considered: tuple[str, ...] = ()


class Learned(Struct, frozen=True, kw_only=True):
    """A footprint changed: keep it."""

    footprint: Footprint


class Sketched(Struct, frozen=True, kw_only=True):
    """Keep what is known of when a model is called."""

    model: str
    sketch: StoredArrivals


Command = Sketched | Send | Publish | Decided | ColdStart | Learned | Quarantined
