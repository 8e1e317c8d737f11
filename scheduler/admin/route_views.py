"""What the admin API shows and takes of routes, and the audit trail."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from runtime.wire.routes import RouteRule, Warmth
from scheduler.audit import AuditEntry


class TargetView(Struct, frozen=True, kw_only=True):
    """One target of a route; the counts are of all routers, since `since_s` of the route."""

    model: str
    version: str | None
    share: float  # per cent of the requests
    warmth: Warmth
    ready: int  # replicas
    requests: int
    errors: int  # of these: 5xx or broken off
    mean_ttft_s: float | None


class CanaryView(Struct, frozen=True, kw_only=True):
    """Where a canary stands."""

    model: str
    step: int  # from 1
    steps: int
    share: float  # per cent
    in_step_s: float
    waits_for: str  # why the step is not over


class SwitchView(Struct, frozen=True, kw_only=True):
    """A switch whose target is being warmed; traffic is as it was."""

    to: str
    ready: int
    replicas: int  # that have to be ready
    deadline_s: float  # left until it is given up
    problem: str | None = None


class RouteView(Struct, frozen=True, kw_only=True):
    """One route and where it stands."""

    name: str
    rule: RouteRule
    targets: tuple[TargetView, ...]
    since_s: float  # it was changed, or this leader took over
    canary: CanaryView | None = None
    switch: SwitchView | None = None


class Routes(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/routes."""

    routes: tuple[RouteView, ...]


class SwitchBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Warm `to`, one of the targets, and then send it everything."""

    to: str
    deadline_s: Annotated[
        float, Meta(gt=0, le=86400, description="seconds after which it is given up")
    ] = 600.0


class ReasonBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, for the audit trail."""

    reason: str = "asked by an operator"


class Audit(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/audit, the newest first."""

    audit: tuple[AuditEntry, ...]
