"""The scheduler's core: a new leader, and nodes that are lost, return or are drained."""

from __future__ import annotations

import pytest

from runtime.wire.agent_messages import StopReplica
from runtime.wire.routes import DemandReport, ModelDemand
from scheduler.core.decisions import Core
from scheduler.state import messages as m
from scheduler.state.cluster import Replica, Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, one_gpu, spec


def test_a_new_leader_adopts_what_runs_and_restarts_nothing() -> None:
    world = World(one_gpu())
    world.put(spec("a"), spec("b"))
    world.want("a")
    world.run(5)
    models = tuple(model.stored for model in world.core.state.models.values())
    before, table = list(world.nodes["n1"].started), world.table
    world.elect(models)
    world.run(10)
    assert world.nodes["n1"].started == before
    assert world.table.version > table.version
    assert world.hot() == {"a"}
    assert not [c for c in world.sent if isinstance(c, StopReplica)]


def test_a_recovering_leader_publishes_nothing_until_its_nodes_report() -> None:
    world = World(one_gpu(), recovery_grace_s=8.0)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    models = tuple(model.stored for model in world.core.state.models.values())
    old = world.table
    world.nodes["n1"].up = False
    world.core = Core(world.settings)
    world.term += 1
    world.apply(m.Elected(now=world.now, term=world.term, models=models, known_nodes=("n1",)))
    world.run(5)
    assert world.table is old  # routers keep their last table
    world.nodes["n1"].up = True
    world.run(2)
    assert world.hot() == {"a"}


def test_a_leader_stops_replicas_of_models_nobody_declares_any_more() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.elect(())
    world.run(5)
    assert not world.nodes["n1"].replicas


def one_waits(world: World, model: str) -> None:
    """A router reports a caller that waits, although the table has an endpoint: it is of no use."""
    world.waiting[model] = 1
    world.router_seq += 1
    world.apply(
        m.DemandSeen(
            now=world.now,
            report=DemandReport(
                router_id="r", boot_id=1, seq=world.router_seq, routes_version=world.table.version,
                models=(ModelDemand(model=model, waiting=1),),
            ),
        )
    )  # fmt: skip


def lost_with_a() -> tuple[World, Replica]:
    """Two nodes, of which the one with `a` has not been heard of for 15 s."""
    world = World(one_gpu(), FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    world.nodes[replica.node_id].up = False
    world.run(15)
    return world, replica


def test_a_lost_nodes_model_is_started_elsewhere_on_demand() -> None:
    world, replica = lost_with_a()
    assert replica.stage is Stage.UNKNOWN
    assert world.hot() == {"a"}  # it may well serve still: routers try, and report who waits
    one_waits(world, "a")
    world.run(5)
    other = {"n1", "n2"} - {replica.node_id}
    assert {r.node_id for r in world.core.state.models["a"].ready()} == other
    assert len(world.route("a").endpoints) == 1


def test_a_node_that_returns_is_adopted_again() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.nodes["n1"].up = False
    world.run(15)
    world.nodes["n1"].up = True
    world.nodes["n1"].boot_id += 1
    world.nodes["n1"].seq = 0
    world.run(2)
    (replica,) = world.core.state.replicas.values()
    assert replica.stage is Stage.READY
    assert world.nodes["n1"].started == ["a-1-1"]


@pytest.mark.parametrize("elected", [False, True], ids=["same leader", "another leader"])
def test_a_node_that_returns_does_not_leave_more_than_max_replicas(elected: bool) -> None:
    """What was started elsewhere meanwhile stays; also if nobody calls, and a new leader adopts."""
    world, replica = lost_with_a()
    one_waits(world, "a")
    world.run(5)
    other = {"n1", "n2"} - {replica.node_id}
    assert {r.node_id for r in world.core.state.models["a"].ready()} == other
    world.nodes[replica.node_id].up = True
    if elected:
        world.elect((m.StoredModel(spec=spec("a")),))
    world.run(8)
    assert {name for name, node in world.nodes.items() if node.replicas} == other
    assert world.hot() == {"a"}


def test_cordon_drain_uncordon() -> None:
    world = World(one_gpu(), FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a", min_replicas=1))
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    first = replica.node_id
    world.apply(m.CordonSet(now=world.now, node_id=first, cordoned=True, drain=True))
    world.run(8)
    assert not world.nodes[first].replicas
    assert {r.node_id for r in world.core.state.replicas.values()} == {"n1", "n2"} - {first}
    world.apply(m.CordonSet(now=world.now, node_id=first, cordoned=False))
    assert world.core.state.nodes[first].schedulable


def test_an_old_heartbeat_is_dropped() -> None:
    world = World(one_gpu())
    old = world.nodes["n1"].heartbeat(world.now)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.apply(m.HeartbeatSeen(now=world.now, heartbeat=old))
    assert world.hot() == {"a"}
