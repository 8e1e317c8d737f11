"""What if: the production core on a copy of its state, told what an operator only asks. Pure.

Rules this file keeps: the live core is not touched, and nothing is decided here: the answer is what
the core itself would do next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from msgspec.structs import replace

from runtime.wire.model_spec import ModelSpec
from scheduler.admin import views as v
from scheduler.core.decisions import Core
from scheduler.state import messages as m
from scheduler.state.cluster import Replica, Stage

_MOVES = {"evict", "move", "sleep", "stop", "unstage"}


def clone(core: Core) -> Core:
    """An independent copy; messages, which are frozen, are shared."""
    memo: dict[int, object] = {}
    state = core.state
    shared: list[object] = [model.stored for model in state.models.values()]
    shared += [model.spec for model in state.models.values()]
    shared += [f for model in state.models.values() for f in model.footprints.values()]
    for node in state.nodes.values():
        shared += [node.heartbeat, *node.devices.values(), *node.cached.values()]
    for replica in state.replicas.values():
        shared += [replica.report, replica.spec]
    shared += [*state.decisions, *state.cold_starts]
    memo.update({id(one): one for one in shared if one is not None})
    return copy.deepcopy(core, memo)


def what_if(core: Core, events: Iterable[m.Event]) -> v.Plan:
    """What the core would decide at once on `events`, each with the state as it is now."""
    copied = clone(core)
    before = set(copied.state.replicas)
    steps: list[v.PlanStep] = []
    for event in events:
        for command in copied.handle(event):
            if isinstance(command, m.Decided):
                steps.append(_step(copied, command))
    placed = [r for r in copied.state.replicas.values() if r.climb and _new(r, before, steps)]
    waits = {r.replica_id: r.climb.expected_s for r in placed if r.climb and r.climb.expected_s}
    refused = {
        name: model.unfit or model.waiting_for or ""
        for name, model in copied.state.models.items()
        if (model.unfit or model.waiting_for)
        and (
            name not in core.state.models
            or model.waiting_for != core.state.models[name].waiting_for
        )
    }
    return v.Plan(steps=tuple(steps), expected_wait_s=waits, not_placed=refused)


def _new(replica: Replica, before: set[str], steps: list[v.PlanStep]) -> bool:
    if replica.replica_id not in before:
        return True
    return replica.stage in (Stage.RISING, Stage.WAKING) and any(
        s.replica_id == replica.replica_id and s.action == "wake" for s in steps
    )


def _step(core: Core, decided: m.Decided) -> v.PlanStep:
    replica = core.state.replicas.get(decided.replica_id or "")
    return v.PlanStep(
        action=decided.action,
        model=decided.model,
        replica_id=decided.replica_id,
        node_id=decided.node_id,
        device_ids=replica.device_ids if replica else (),
        device_bytes=replica.bytes if replica else None,
        goes_to=_rung(replica) if replica and decided.action in _MOVES else None,
        reason=decided.reason,
        considered=decided.considered,
    )


def _rung(replica: Replica) -> str:
    return f"asleep-{replica.sleep_level}" if replica.sleep_level else "stopped"


def questions(core: Core, body: v.PlanBody, now: float) -> list[m.Event]:
    """The events that a question stands for. Raises LookupError naming what is not there."""
    state = core.state
    events: list[m.Event] = []
    if body.add is not None:
        events += [
            m.ModelPut(now=now, model=m.StoredModel(spec=body.add)),
            m.LoadAsked(now=now, model=body.add.name, replicas=max(1, body.add.min_replicas)),
        ]
    if body.load is not None:
        if body.load not in state.models:
            raise LookupError(f"model {body.load}")
        count = body.replicas
        stored = state.models[body.load].stored
        if count > stored.spec.max_replicas:
            spec: ModelSpec = replace(stored.spec, max_replicas=count)
            events.append(m.ModelPut(now=now, model=replace(stored, spec=spec)))
        events.append(m.LoadAsked(now=now, model=body.load, replicas=count))
    if body.remove_node is not None:
        node = state.nodes.get(body.remove_node)
        if node is None or node.heartbeat is None:
            raise LookupError(f"node {body.remove_node}")
        events.append(m.CordonSet(now=now, node_id=body.remove_node, cordoned=True, drain=True))
    return events
