"""What routers, and those who wait, are told of a model. Pure."""

from __future__ import annotations

from runtime.wire.routes import CacheRule, Endpoint, ModelRoute, Warmth
from scheduler.policy.ladder import START_RUNGS, step_name
from scheduler.state.cluster import ClusterState, Model, Stage
from scheduler.state.replica import Replica
from scheduler.state.stages import BUSY


def model_route(state: ClusterState, model: Model, now: float) -> ModelRoute:
    """What routers must know of one model."""
    spec = model.spec
    serving = model.ready() or [
        r for r in model.replicas.values() if r.stage is Stage.UNKNOWN and r.ready_at
    ]
    endpoints = tuple(
        Endpoint(
            replica_id=r.replica_id,
            base_url=r.report.base_url,
            key=r.report.key or "",
            devices=len(r.device_ids),
            full=r.full,
        )
        for r in sorted(serving, key=lambda r: r.replica_id)
        if r.report is not None and r.report.base_url is not None
    )
    why, retry_after_s = (None, None) if endpoints else refusal(model, now)
    return ModelRoute(
        name=spec.name, aliases=spec.aliases, adapters=spec.adapter_names(),
        root=_hub_name(spec.source), max_model_len=_max_model_len(model),
        warmth=warmth(model, now),
        endpoints=endpoints, target_concurrency=spec.target_concurrency,
        hold_s=spec.hold_s, max_queue=spec.max_queue,
        refusal=why, refusal_final=why is not None and final(model),
        retry_after_s=retry_after_s,
        waiting_for=None if endpoints else waiting_for(state, model),
        eta_s=None if endpoints else _eta_s(state, model, now), failures=_failures(model),
        affinity=spec.affinity,
        cache=_cache_rule(model), batching=spec.batching,
        hedge_after_s=spec.hedge_after_ms / 1000 if spec.hedge_after_ms else None,
    )  # fmt: skip


def lost_urls(state: ClusterState) -> tuple[str, ...]:
    """Where engines listened whose node no longer reports, those that were leaving too."""
    replicas = (r for node in state.nodes.values() if node.lost for r in node.replicas.values())
    urls = (r.report.base_url for r in replicas if r.report is not None)
    return tuple(sorted(url for url in urls if url is not None))


def _failures(model: Model) -> dict[str, str]:
    """Why engines of its died that do not serve again yet."""
    return {r.replica_id: why for r in model.replicas.values() if (why := died_of(r)) is not None}


def died_of(replica: Replica) -> str | None:
    """Why its engine died, while it is started again; None: it did not."""
    report = replica.report
    if replica.stage not in (Stage.STARTING, Stage.BACKOFF) or report is None:
        return None
    return report.reason


def _hub_name(source: str) -> str:
    """`org/name` of a source on the hub. A folder's path is nobody's business."""
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else ""


def _max_model_len(model: Model) -> int | None:
    estimate = model.stored.estimate
    return estimate.max_model_len if estimate else None


def _cache_rule(model: Model) -> CacheRule | None:
    caching = model.spec.response_cache
    if caching is None:
        return None
    adapters = sorted(model.spec.adapters.items())  # they come and go without a restart
    revision = f"{model.spec.name} {model.launch_key} {adapters}"
    return CacheRule(ttl_s=caching.ttl_s, shared=caching.shared, revision=revision)


def adapters_on(state: ClusterState, node_id: str) -> dict[str, dict[str, str]]:
    """What a node's agent must know of LoRA adapters: for `HeartbeatReply.adapters`."""
    found = {}
    node = state.nodes.get(node_id)
    for replica in node.replicas.values() if node else ():
        model = state.models.get(replica.model)
        # One that was started with adapters, or may have been, is told that it has none any more.
        if model and (model.spec.adapters or replica.spec is None or replica.spec.adapters):
            found[model.name] = model.spec.adapters
    return found


def _eta_s(state: ClusterState, model: Model, now: float) -> float | None:
    """Seconds a cold call is expected to wait still, where that was measured before: its model's
    own way up, and that of the one it comes after."""
    coming = min(model.coming(), key=lambda r: r.since, default=None)
    left_s = _left_s(model, coming, now)
    first = _goes_first(state, coming) if coming is not None and coming.plan else None
    if first is not None and first.stage in BUSY and left_s is not None:
        owner = state.models.get(first.model)
        first_s = _left_s(owner, first, now) if owner is not None else None
        left_s = None if first_s is None else left_s + first_s
    return None if left_s is None else round(left_s, 1)


def _left_s(model: Model, coming: Replica | None, now: float) -> float | None:
    """Of the way up of `coming`, or (None) of the next one."""
    if coming is not None:
        level = coming.sleep_level
        rung = coming.report.started_from if coming.report else "cached"
    else:
        level, rung = max((r.sleep_level for r in model.asleep()), default=0), "cached"
    steps = [step_name(level, rung), *(() if level else (step_name(0, r) for r in START_RUNGS))]
    measured = next((s for s in map(model.measured_s, steps) if s is not None), None)
    if measured is None:
        return None
    began_at = coming.climb.sent_at if coming and coming.climb else None
    return max(0.1, measured - (now - began_at if began_at is not None else 0.0))


def refusal(model: Model, now: float) -> tuple[str | None, float | None]:
    """Why requests for a cold model are turned away, and when to come back."""
    if model.unfit is not None:
        return model.unfit, None if final(model) else 30.0
    if model.blocked_until > now:
        again_s = None if model.problem_final else round(model.blocked_until - now, 1)
        return f"it did not start: {model.problem}", again_s
    return None, None


def final(model: Model) -> bool:
    """Whether what `refusal` says stays so until somebody changes the model or the nodes."""
    return model.unfit_final if model.unfit is not None else model.problem_final


def warmth(model: Model, now: float) -> Warmth:
    """How warm the model is, in the words of the API."""
    if model.ready():
        return "hot"
    if model.coming():
        return "starting"
    if model.asleep():
        return "asleep"
    if refusal(model, now)[0]:
        return "failed"
    return "staged" if model.staged_on else "cold"


def waiting_for(state: ClusterState, model: Model) -> str | None:
    """What those who wait are waiting for, in words."""
    for replica in model.coming():
        where = f"{replica.node_id} ({', '.join(replica.device_ids)})"
        match replica.stage:
            case Stage.PLANNED | Stage.RISING:
                return f"{_turn(state, replica)} on {where}"
            case Stage.SENT | Stage.STARTING:
                died = died_of(replica)
                return (
                    f"starting on {where} after it died: {died}" if died else f"starting on {where}"
                )
            case Stage.WAKING:
                return f"waking on {where}"
            case Stage.BACKOFF:
                return f"restarting on {where} after: {died_of(replica)}"
    return model.waiting_for


def _turn(state: ClusterState, replica: Replica) -> str:
    """What a planned replica is queued after."""
    first = _goes_first(state, replica)
    if first is None:
        return "its turn"
    if first.leaving:
        return f"queued after {first.model}, which makes room"
    return f"queued after the {'wake' if first.stage is Stage.WAKING else 'start'} of {first.model}"


def _goes_first(state: ClusterState, replica: Replica) -> Replica | None:
    """Who has its turn on a device of `replica` now, or else has still to leave it."""
    node = state.nodes[replica.node_id]
    others = [r for d in replica.device_ids for r in node.on_device(d) if r is not replica]
    busy = [r for r in others if r.stage in BUSY]
    return min(busy or (r for r in others if r.leaving), key=lambda r: r.since, default=None)
