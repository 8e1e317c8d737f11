"""The admin API as a table: what the server serves and the OpenAPI document describes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.contract.access import KeySpec, Role, Tenant
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import RouteRule
from scheduler.admin import cache_client as c
from scheduler.admin import route_views as r
from scheduler.admin import views as v
from scheduler.admin.handlers import access_api as a

_COUNT = {"type": "integer", "minimum": 0}
_MODEL_NODE = {"model": {"type": "string"}, "node": {"type": "string"}}
_FLAG = {"type": "string", "enum": ["0", "1"]}


@dataclass(frozen=True, slots=True)
class Unaudited:
    """A change that the audit trail leaves out, and why."""

    why: str


# What an operator steers for a while, as calls do: it is over by itself.
_PASSES = Unaudited("it is over by itself; /admin/decisions says what came of it")
_COPIES = Unaudited("a cache holds copies: no model changes, and what is missing is fetched again")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `handler` names a method of `api.AdminApi`, or of a part of it.

    `role`: the least that a token must have; left out, viewer to read and operator to change.
    `audit`: who enters a change into the audit trail, the guard (admin/guard.py) after the handler
    or the route book (scheduler/route_book.py) with what was before; or why nobody does. A GET
    changes nothing, so it has none; whatever else leaves it out is a ValueError.
    """

    method: str
    path: str
    handler: str
    summary: str
    says: str  # what the good answer is
    reply: Any = None  # a views struct, str for text, dict for free JSON, None for no body
    body: Any = None
    status: int = 200
    also_status: int | None = None
    errors: tuple[int, ...] = ()
    query: dict[str, dict[str, Any]] = field(default_factory=dict)
    open: bool = False  # served without a token
    standby: bool = False  # served by a scheduler that stands by too; what is open always is
    scraped: bool = False  # metrics_token opens it too
    role: Role | None = None
    audit: Literal["guard", "route_book"] | Unaudited | None = None

    def __post_init__(self) -> None:
        if (self.method == "GET") != (self.audit is None):
            fix = 'say audit="guard", or Unaudited(why)' if self.audit is None else "leave it out"
            raise ValueError(f"{self.method} {self.path}: audit is {self.audit!r}: {fix}")

    @property
    def needs(self) -> Role:
        """The least role that may."""
        return self.role or ("viewer" if self.method == "GET" else "operator")


ADMIN = (
    Operation("GET", "/admin/models", "models.list_models", "List models", "every model", v.Models),
    Operation(
        "POST", "/admin/models", "models.create_model", "Add a model", "it was added", v.Saved,
        body=ModelSpec, status=201, errors=(400, 409, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "GET", "/admin/models/{name}", "models.show_model",
        "Show a model", "the model", v.ModelView,
        errors=(404,),
    ),
    Operation(
        "PUT", "/admin/models/{name}", "models.put_model",
        "Add or change a model", "it was changed",
        v.Saved, body=ModelSpec, also_status=201, errors=(400, 409, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "DELETE", "/admin/models/{name}", "models.delete_model",
        "Remove a model, draining its replicas",
        "it was removed", status=204, errors=(404, 409), role="admin",
        audit="guard",
    ),
    Operation(
        "POST", "/admin/models/{name}/load", "models.load_model",
        "Start replicas ahead of requests",
        "the model; watch `ready`", v.ModelView, body=v.LoadBody, status=202,
        errors=(400, 404, 422),
        audit=_PASSES,
    ),
    Operation(
        "POST", "/admin/models/{name}/unload", "models.unload_model", "Drain and stop its replicas",
        "the model; watch `replicas`", v.ModelView, status=202, errors=(404, 409),
        audit=_PASSES,
    ),
    Operation(
        "POST", "/admin/models/{name}/pin", "models.pin_model", "Keep a model running, or stop to",
        "the model", v.ModelView, body=v.PinBody, errors=(400, 404, 422),
        audit="guard",
    ),
    Operation(
        "POST", "/admin/models/{name}/prewarm", "models.prewarm_model",
        "Be warm by a time, for a while",
        "the model; `floor` says from when on", v.ModelView, body=v.PrewarmBody, status=202,
        errors=(400, 404, 422),
        audit=_PASSES,
    ),
    Operation(
        "GET", "/admin/replicas", "replicas.list_replicas",
        "List replicas", "every replica", v.Replicas,
    ),
    Operation(
        "GET", "/admin/replicas/{id}", "replicas.show_replica", "Show a replica", "the replica",
        v.ReplicaView, errors=(404,),
    ),
    Operation(
        "POST", "/admin/replicas/{id}/unload", "replicas.unload_replica",
        "Drain and stop one replica",
        "the replica", v.ReplicaView, status=202, errors=(404, 409),
        audit=_PASSES,
    ),
    Operation(
        "GET", "/admin/replicas/{id}/logs", "replicas.replica_logs",
        "The engine's own output", "the log",
        str, errors=(400, 404, 502), query={"tail": _COUNT, "follow": _FLAG},
    ),
    Operation("GET", "/admin/nodes", "nodes.list_nodes", "List nodes", "every node", v.Nodes),
    Operation(
        "POST", "/admin/nodes/{id}/cordon", "nodes.cordon_node", "Place nothing new on a node",
        "the node", v.NodeView, errors=(404,),
        audit="guard",
    ),
    Operation(
        "POST", "/admin/nodes/{id}/drain", "nodes.drain_node",
        "Cordon a node and move off what it runs, or stop it at the deadline",
        "the node; it is empty once `replicas` is 0", v.NodeView, body=v.DrainBody,
        errors=(400, 404, 422),
        audit="guard",
    ),
    Operation(
        "POST", "/admin/nodes/{id}/devices/{device}/quarantine", "nodes.quarantine_device",
        "Use a device no more and move off what it runs", "the node", v.NodeView,
        body=v.QuarantineBody, errors=(400, 404, 422),
        audit="guard",
    ),
    Operation(
        "POST", "/admin/nodes/{id}/devices/{device}/release", "nodes.release_device",
        "Use a quarantined device again", "the node", v.NodeView, errors=(404, 409),
        audit="guard",
    ),
    Operation(
        "POST", "/admin/plan", "models.plan", "What would happen if …, without doing it",
        "the decisions that would be made at once", v.Plan, body=v.PlanBody,
        errors=(400, 404, 422),
        audit=Unaudited("it changes nothing"),
    ),
    Operation(
        "POST", "/admin/nodes/{id}/uncordon", "nodes.uncordon_node", "Use a node again", "the node",
        v.NodeView, errors=(404,),
        audit="guard",
    ),
    Operation(
        "GET", "/admin/devices", "nodes.list_devices",
        "List devices", "every device", v.Devices,
    ),
    Operation(
        "GET", "/admin/queue", "show_queue", "Requests waiting and in flight, by model",
        "the queue", v.Queue,
    ),
    Operation(
        "GET", "/admin/decisions", "list_decisions", "What was decided, and why", "newest first",
        v.Decisions, errors=(400,), query={"limit": _COUNT, "model": {"type": "string"}},
    ),
    Operation(
        "GET", "/admin/coldstarts", "list_cold_starts", "Post-mortems of cold starts and wakes",
        "newest first", v.ColdStarts, errors=(400,),
        query={"limit": _COUNT, "model": {"type": "string"}},
    ),
    Operation(
        "GET", "/admin/models/{name}/footprint", "models.show_footprint",
        "What it was declared, estimated and measured to take", "its footprint", v.Footprints,
        errors=(404,),
    ),
    Operation(
        "GET", "/admin/cache", "caches.show_caches",
        "The model caches of the nodes", "each node's cache",
        c.Caches, errors=(404,), query={"node": {"type": "string"}},
    ),
    Operation(
        "POST", "/admin/cache/pull", "caches.pull_model",
        "Fetch a model to nodes before it is needed",
        "each node's pull; watch them in /admin/cache", c.Pulls, body=c.CachePullBody, status=202,
        errors=(400, 404, 422),
        audit=_COPIES,
    ),
    Operation(
        "DELETE", "/admin/cache", "caches.remove_cached", "Remove a model from caches",
        "what each node freed", c.Removals, errors=(400, 404), query=_MODEL_NODE,
        audit=_COPIES,
    ),
    Operation(
        "POST", "/admin/cache/verify", "caches.verify_cached",
        "Read a cached model again and check it",
        "each node's verdict", c.Verdicts, errors=(400, 404), query=_MODEL_NODE,
        audit=_COPIES,
    ),
    Operation("GET", "/admin/routes", "rules.list_routes", "List routes", "every route", r.Routes),
    Operation(
        "GET", "/admin/routes/{name}", "rules.show_route", "Show a route", "the route", r.RouteView,
        errors=(404,),
    ),
    Operation(
        "PUT", "/admin/routes/{name}", "rules.put_route",
        "Add or change a route, which begins its canary, if it has one", "it was changed",
        r.RouteView, body=RouteRule, also_status=201, errors=(400, 409, 422), role="admin",
        audit="route_book",
    ),
    Operation(
        "DELETE", "/admin/routes/{name}", "rules.delete_route", "Remove a route; its models stay",
        "it was removed", status=204, errors=(404,), role="admin",
        audit="route_book",
    ),
    Operation(
        "POST", "/admin/routes/{name}/switch", "rules.switch_route",
        "Warm a target, then send it everything", "the route; watch `switch`", r.RouteView,
        body=r.SwitchBody, status=202, errors=(400, 404, 409, 422),
        audit="route_book",
    ),
    Operation(
        "POST", "/admin/routes/{name}/promote", "rules.promote_route",
        "Send everything to the canary", "the route", r.RouteView, body=r.ReasonBody,
        errors=(400, 404, 409, 422),
        audit="route_book",
    ),
    Operation(
        "POST", "/admin/routes/{name}/rollback", "rules.roll_back_route",
        "Send nothing to the canary any more, or call a pending switch off", "the route",
        r.RouteView, body=r.ReasonBody, errors=(400, 404, 409, 422),
        audit="route_book",
    ),
    Operation(
        "GET", "/admin/audit", "rules.list_audit", "Who changed what, when and why",
        "newest first", r.Audit, errors=(400,),
        query={"limit": _COUNT, "route": {"type": "string"}},
    ),
    Operation("GET", "/admin/keys", "access.list_keys", "List API keys", "every key", a.Keys),
    Operation(
        "POST", "/admin/keys", "access.create_key", "Make an API key",
        "the key and, this once, its secret", a.NewKey, body=KeySpec, status=201,
        errors=(400, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "GET", "/admin/keys/{id}", "access.show_key", "Show an API key", "the key", a.KeyView,
        errors=(404,),
    ),
    Operation(
        "PUT", "/admin/keys/{id}", "access.put_key", "Change what an API key may", "the key",
        a.KeyView, body=KeySpec, errors=(400, 404, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "POST", "/admin/keys/{id}/rotate", "access.rotate_key", "Give an API key a new secret",
        "the key and, this once, its secret", a.NewKey, body=a.RotateBody,
        errors=(400, 404, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "DELETE", "/admin/keys/{id}", "access.delete_key", "Revoke an API key", "it was revoked",
        status=204, errors=(404,), role="admin",
        audit="guard",
    ),
    Operation(
        "GET", "/admin/tenants", "access.list_tenants", "List tenants", "every tenant", a.Tenants
    ),
    Operation(
        "PUT", "/admin/tenants/{name}", "access.put_tenant", "Describe a tenant", "the tenant",
        Tenant, body=Tenant, errors=(400, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "DELETE", "/admin/tenants/{name}", "access.delete_tenant",
        "Forget a tenant that has no keys", "it was forgotten", status=204, errors=(404, 409),
        role="admin",
        audit="guard",
    ),
    Operation(
        "GET", "/admin/tokens", "access.list_tokens", "List admin tokens", "every token", a.Tokens,
        role="admin",
    ),
    Operation(
        "POST", "/admin/tokens", "access.create_token", "Make an admin token",
        "the token and, this once, its secret", a.NewToken, body=a.TokenBody, status=201,
        errors=(400, 422), role="admin",
        audit="guard",
    ),
    Operation(
        "DELETE", "/admin/tokens/{id}", "access.delete_token", "Revoke an admin token",
        "it was revoked", status=204, errors=(404,), role="admin",
        audit="guard",
    ),
    Operation(
        "GET", "/admin/usage", "access.show_use", "What keys and tenants used of a day",
        "each account's use", a.Use, errors=(400,), query={"day": {"type": "string"}},
    ),
    Operation(
        "GET", "/admin/spec-schema", "spec_schema", "The JSON Schema of a model spec",
        "the schema", dict,
    ),
    Operation("GET", "/healthz", "healthz", "Is this process alive", "it is", v.Health, open=True),
    Operation(
        "GET", "/readyz", "readyz", "Does this scheduler lead and know its nodes", "it does",
        v.Health, open=True,
    ),
    Operation(
        "GET", "/metrics", "metrics", "Prometheus metrics (metrics_token opens them too)",
        "the metrics", str, standby=True, scraped=True,
    ),
    Operation(
        "GET", "/openapi.json", "openapi", "This document", "the document", dict, standby=True,
    ),
)  # fmt: skip
