"""The admin API's answers, made from the core's state, which it only reads. Pure."""

from __future__ import annotations

import itertools

from scheduler.admin import views as v
from scheduler.core.decisions import Core
from scheduler.policy import model_routes
from scheduler.state.cluster import MARGIN, Model, Node, Replica, Stage
from scheduler.state.messages import StoredModel

_STATES: dict[Stage, v.ReplicaState] = {
    Stage.PLANNED: "planned",
    Stage.SENT: "starting",
    Stage.STARTING: "starting",
    Stage.READY: "ready",
    Stage.UNROUTING: "draining",
    Stage.BACKOFF: "backoff",
    Stage.RISING: "waking",
    Stage.WAKING: "waking",
    Stage.ASLEEP: "asleep",
    Stage.SLEEPING: "sleeping",
    Stage.UNKNOWN: "unknown",
}


def models(core: Core, now: float) -> v.Models:
    """Every model, by name."""
    ordered = sorted(core.state.models.items())
    return v.Models(models=tuple(model(core, entry, now) for _, entry in ordered))


def model(core: Core, entry: Model, now: float) -> v.ModelView:
    """One model."""
    demand = core.state.demand(entry.spec.name)
    problem, retry_after_s = model_routes.refusal(entry, now)
    stored: StoredModel = entry.stored
    return v.ModelView(
        name=entry.spec.name,
        spec=stored.spec,
        warmth=model_routes.warmth(entry, now),
        device_memory_bytes=entry.spec.device_memory_bytes or 0,
        memory_from="estimated" if stored.spec.device_memory_bytes is None else "declared",
        estimate=stored.estimate,
        wanted=entry.wanted,
        wanted_why=entry.wanted_why,
        replicas=len(entry.replicas),
        ready=len(entry.ready()),
        waiting=demand.waiting,
        in_flight=demand.in_flight,
        pinned=entry.pinned,
        floor=entry.floor,
        idle_for_s=None if entry.active_at is None else round(now - entry.active_at, 3),
        problem=problem or model_routes.waiting_for(core.state, entry)
        if not entry.ready()
        else None,
        retry_after_s=retry_after_s,
    )


def replicas(core: Core, now: float) -> v.Replicas:
    """Every replica, by model and id."""
    ordered = sorted(core.state.replicas.values(), key=lambda r: (r.model, r.replica_id))
    return v.Replicas(replicas=tuple(replica(core, entry, now) for entry in ordered))


def replica(core: Core, entry: Replica, now: float) -> v.ReplicaView:
    """One replica."""
    report = entry.report
    owner = core.state.models.get(entry.model)
    spec = owner.spec if owner else entry.spec
    idle = entry.stage is Stage.READY and not core.state.in_flight(entry)
    return v.ReplicaView(
        replica_id=entry.replica_id,
        model=entry.model,
        node_id=entry.node_id,
        device_ids=entry.device_ids,
        device_bytes=entry.bytes,
        state=_state(entry),
        since_s=round(now - entry.since, 3),
        in_flight=core.state.in_flight(entry),
        idle_for_s=round(now - entry.used_at, 3) if idle else None,
        restarts=report.restarts if report else 0,
        reason=(report.reason if report else None) or entry.reason,
        died=report.died if report else None,
        start_s=report.start_s if report else None,
        wake_s=report.wake_s if report else None,
        sleep_level=entry.sleep_level,
        residue_bytes=entry.residue,
        host_bytes=entry.host_booked,
        disabled=report.disabled if report else {},
        pid=report.pid if report else None,
        memory_used_bytes=report.memory_used_bytes if report else None,
        outdated=owner is not None and entry.launch_key != owner.launch_key,
        engine=report.engine if report else (spec.engine if spec else ""),
        engine_version=report.engine_version if report else None,
    )


def _state(entry: Replica) -> v.ReplicaState:
    if entry.stage is not Stage.STOPPING:
        return _STATES[entry.stage]
    phase = entry.report.phase if entry.report else "stopping"
    return phase if phase in ("draining", "failed") else "stopping"


def nodes(core: Core, now: float) -> v.Nodes:
    """Every node that has ever reported to this leader."""
    known = (n for n in core.state.nodes.values() if n.heartbeat is not None)
    ordered = sorted(known, key=lambda n: n.node_id)
    return v.Nodes(nodes=tuple(node(core, n, now) for n in ordered))


def node(core: Core, entry: Node, now: float) -> v.NodeView:
    """One node that has reported."""
    heartbeat = entry.heartbeat
    assert heartbeat is not None
    draining = entry.drain is not None or heartbeat.draining
    return v.NodeView(
        node_id=entry.node_id,
        address=heartbeat.address,
        state="lost" if entry.lost
        else "preempted" if heartbeat.preempted_in_s is not None
        else "draining" if draining
        else "cordoned" if entry.cordoned
        else "ready",
        last_heartbeat_s=round(now - entry.seen_at, 3),
        devices=len(entry.devices),
        replicas=len(entry.replicas),
        memory_total_bytes=sum(d.memory_total_bytes for d in entry.devices.values()),
        memory_booked_bytes=sum(entry.committed(d) for d in entry.devices),
        host_memory_total_bytes=heartbeat.host_memory_total_bytes,
        host_memory_available_bytes=heartbeat.host_memory_available_bytes,
        host_budget_bytes=heartbeat.host_budget_bytes,
        host_booked_bytes=heartbeat.host_budget_bytes - entry.host_free(),
        staged=tuple(sorted(hold.model for hold in entry.holds.values())),
        shells=tuple(
            name for name, m in core.state.models.items() if m.launch_key in heartbeat.shells
        ),
        preemptible=heartbeat.preemptible,
        preempted_in_s=heartbeat.preempted_in_s,
        engines=heartbeat.engines,
        labels=heartbeat.labels,
        version=heartbeat.version,
    )  # fmt: skip


def devices(core: Core) -> v.Devices:
    """Every device of every node."""
    ordered = sorted(core.state.nodes.values(), key=lambda n: n.node_id)
    return v.Devices(
        devices=tuple(
            v.DeviceView(
                node_id=n.node_id,
                report=report,
                booked_bytes=n.committed(device_id),
                free_bytes=max(0, n.plannable(device_id)),
                replicas=tuple(sorted(r.replica_id for r in n.on_device(device_id))),
                quarantined=n.quarantine.get(device_id),
            )
            for n in ordered
            for device_id, report in n.devices.items()
        )
    )


def queue(core: Core) -> v.Queue:
    """Models with requests waiting or in flight, the longest wait first."""
    found = []
    for name, entry in core.state.models.items():
        demand = core.state.demand(name)
        if demand.waiting or demand.in_flight:
            found.append(
                v.QueueView(
                    model=name,
                    waiting=demand.waiting,
                    in_flight=demand.in_flight,
                    oldest_wait_s=round(demand.oldest_wait_s, 3),
                    waiting_for=model_routes.waiting_for(core.state, entry)
                    if demand.waiting
                    else None,
                )
            )
    return v.Queue(queue=tuple(sorted(found, key=lambda q: (-q.oldest_wait_s, q.model))))


def cold_starts(core: Core, now: float, limit: int, name: str | None) -> v.ColdStarts:
    """The latest post-mortems, newest first; with `name` those of one model."""
    # A record is written once its phases are known: the climb that ended last may be older.
    ordered = sorted(core.state.cold_starts, key=lambda c: (-c.at, -c.number))
    newest = (c for c in ordered if name in (None, c.model))
    return v.ColdStarts(
        cold_starts=tuple(
            v.ColdStartView(
                age_s=round(now - c.at, 3),
                **{f: getattr(c, f) for f in c.__struct_fields__ if f != "at"},
            )
            for c in itertools.islice(newest, limit)
        )
    )


def footprints(entry: Model) -> v.Footprints:
    """What a model was declared, estimated and measured to take."""
    declared = entry.stored.spec.device_memory_bytes
    source = "declared" if declared is not None else "estimated"
    parallel = entry.spec.tensor_parallel_size
    budget, booked = entry.spec.booked_bytes() * parallel, entry.booked_bytes() * parallel
    return v.Footprints(
        model=entry.spec.name,
        declared_bytes=declared,
        estimate=entry.stored.estimate,
        booked_bytes=booked,
        margin=MARGIN,
        booked_from=source if booked == budget else "measured",
        measured=tuple(
            v.FootprintView(
                launch_key=f.key.launch_key,
                engine=f.key.engine,
                engine_version=f.key.engine_version,
                device_kind=f.key.device_kind,
                current=f.key.launch_key == entry.launch_key,
                device_bytes=f.device_bytes,
                residue_bytes=f.residue_bytes,
                host_bytes=f.host_bytes,
                host_asleep_bytes=f.host_asleep_bytes,
                times={
                    step: v.StepTimes(
                        count=len(t.samples),
                        p50_s=t.percentile_s(0.5),
                        p95_s=t.percentile_s(0.95),
                        last_s=t.last_s,
                    )
                    for step, t in f.times.items()
                    if t.samples
                },
            )
            for f in entry.footprints.values()
        ),
    )


def decisions(core: Core, now: float, limit: int, name: str | None) -> v.Decisions:
    """The latest decisions, newest first; with `name` those about one model."""
    newest = (d for d in reversed(core.state.decisions) if name in (None, d.model))
    return v.Decisions(
        decisions=tuple(
            v.DecisionView(
                number=d.number,
                age_s=round(now - d.at, 3),
                action=d.action,
                model=d.model,
                replica_id=d.replica_id,
                node_id=d.node_id,
                reason=d.reason,
                cause=d.cause,
                considered=d.considered,
            )
            for d in itertools.islice(newest, limit)
        )
    )
