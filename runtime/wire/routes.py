"""What the scheduler and the routers say to each other: routes, and what callers ask for. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from runtime.wire.model_spec import Batching
from runtime.wire.names import Name

# ------------------------------------------------------------------------------ versions of a model

# Unknown fields are refused where a rule is read (runtime/contract/route_rules.py), not here: an
# older router must be able to read a newer scheduler's table.

SEMVER_PATTERN = (
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$(?!\n)"
)


class RouteTarget(Struct, frozen=True, kw_only=True):
    """One target of a route, and its share: `weight` of the sum of all weights."""

    model: Annotated[Name, Meta(description="the name of a model")]
    weight: Annotated[float, Meta(ge=0, le=1e6, description="its part of the sum; 0: none")] = 1.0
    version: Annotated[
        Annotated[str, Meta(pattern=SEMVER_PATTERN)] | None,
        Meta(description="semantic version, e.g. 1.2.0: callers may ask for NAME@1.2.0 or NAME@1"),
    ] = None


class Mirror(Struct, frozen=True, kw_only=True):
    """A copy of so many requests goes to a model whose answers nobody sees."""

    model: Annotated[Name, Meta(description="the name of a model that is not a target")]
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


REPORT_S = 1.0  # between a router's reports, while nothing is urgent


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
