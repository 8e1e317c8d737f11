"""Which engines of other models could serve a model as they are, and what that costs. Pure policy.

An engine of the same architecture, arguments and size is pointed at another model's weights in a
fraction of a start: no process, no compiling. What it was has to start again when it is called.

Rules this file keeps: only an idle engine or a sleeper; only where its agent says that it may: it
has seen both models' own engines, knows the model's canary, and has its weights on its disk.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.policy.ladder import Descent, chance, climb_s
from scheduler.state.cluster import ClusterState, Model, Node, Replica, Stage


def shells(state: ClusterState, model: Model, now: float) -> Iterator[tuple[Node, Replica]]:
    """Replicas of other models whose engines could be pointed at `model`."""
    if not state.shells or now < model.own_engine_until:
        return
    for node_id, key in state.index.shells.get(model.launch_key, {}).items():
        node = state.nodes[node_id]
        if not node.schedulable:
            continue
        for replica in node.replicas.values():
            if replica.model != model.name and _could(state, node, replica, key):
                yield node, replica


def lost(state: ClusterState, node: Node, replica: Replica, now: float) -> Descent:
    """What its owner loses: its next call waits for a start instead of for nothing, or a wake."""
    owner = state.models[replica.model]
    here_s = climb_s(owner, replica.sleep_level) if replica.stage is Stage.ASLEEP else 0.0
    there_s = climb_s(owner, 0, node.start_rung(owner.spec.source))
    cost = chance(state, owner, replica.used_at, now) * max(0.0, there_s - here_s)
    return Descent(replica, 0, replica.committed, 0, cost)


def _could(state: ClusterState, node: Node, replica: Replica, key: str) -> bool:
    report = replica.report
    return (
        report is not None
        and report.shell_key == key
        and replica.doomed_at is None
        and (
            replica.stage is Stage.ASLEEP
            or (replica.stage is Stage.READY and not state.in_flight(replica))
        )
        and not state.demand(replica.model).waiting
        and all(map(node.usable, replica.device_ids))
    )
