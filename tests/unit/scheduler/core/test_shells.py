"""An engine that serves one model is pointed at another: when, and what follows when it fails."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from runtime.wire.agent_messages import CachedModel, RepointReplica, StartReplica, StopReplica
from scheduler.state import messages as m
from scheduler.state.cluster import Replica, Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, spec

A, B, C = (spec(name, 8, idle_s=600.0, asleep_s=600.0) for name in "abc")


def world_of(*specs, rungs=(), gib=10, shells=(A, B), **node_fields) -> World:
    """One device for one model; the engines of `shells` are alike."""
    keys = {one.launch_key(): "k" for one in shells}
    node = FakeNode(
        "n1", {"g0": gib * GIB}, rungs=rungs, host_budget=99 * GIB, shells=keys, start_s=30.0,
        residue=GIB, cached=(CachedModel(source="/models/x", disk_bytes=1),), **node_fields,
    )  # fmt: skip
    world = World(node)
    world.put(*(specs or (A, B)))
    return world


def serve(world: World, model: str, seconds: float = 40.0) -> None:
    world.want(model)
    world.run(seconds)
    assert model in world.hot()


def rising() -> tuple[World, Replica]:
    """The engine of `a` is to be pointed at `b`, but routers have not confirmed its leave."""
    world = world_of()
    serve(world, "a")
    world.router_acks = False
    world.want("b")
    world.run(0.5)
    (replica,) = world.core.state.replicas.values()
    return world, replica


def sent(world: World, kind: type) -> list:
    return [command for command in world.sent if isinstance(command, kind)]


def test_an_idle_engine_of_the_same_kind_serves_the_next_model_in_its_process() -> None:
    world = world_of()
    serve(world, "a")
    (replica,) = world.core.state.replicas.values()
    world.want("b")
    world.run(4.0)
    assert world.hot() == {"b"}
    assert world.core.state.replicas == {replica.replica_id: replica}
    assert (replica.model, replica.launch_key, replica.former) == ("b", B.launch_key(), None)
    (command,) = sent(world, RepointReplica)
    assert command.spec == B
    assert len(sent(world, StartReplica)) == 1
    assert not sent(world, StopReplica)
    decided = next(d for d in world.decided if d.action == "repoint")
    assert (decided.model, decided.reason) == ("b", "in the engine of a")
    climb = world.cold_starts[-1]
    assert (climb.model, climb.rung, climb.outcome) == ("b", "shell", "ready")
    assert world.learned[next(k for k in world.learned if k.model == "b")].times["repoint"].last_s


def test_it_is_told_only_once_no_router_sends_it_requests_for_what_it_was() -> None:
    world = world_of()
    serve(world, "a")
    world.router_acks = False
    world.want("b")
    world.run(1.0)
    assert not sent(world, RepointReplica)
    assert world.hot() == set()
    world.router_acks = True
    world.run(1.5)
    assert sent(world, RepointReplica)


def test_a_sleeper_is_pointed_where_it_lies_once_its_memory_is_free() -> None:
    world = world_of(A, B, C, rungs=(1, 2), gib=18, shells=(A, B))
    serve(world, "a")
    serve(world, "c")
    a = next(r for r in world.core.state.replicas.values() if r.model == "a")
    # A third model, of another kind, makes `a` sleep.
    other = spec("d", 8, idle_s=600.0)
    world.put(other)
    serve(world, "d")
    assert a.stage is Stage.ASLEEP
    world.want("b", wait_s=30.0)  # long enough to be worth `a`'s way back
    world.run(6.0)
    assert "b" in world.hot()
    assert (a.model, a.stage) == ("b", Stage.READY)
    assert sent(world, RepointReplica)


@pytest.mark.parametrize("why", ["other key", "unknown", "in use", "pinned"])
def test_what_is_not_alike_or_not_free_is_left_alone(why: str) -> None:
    world = world_of(gib=20)
    node = world.nodes["n1"]
    node.devices["g0"] = 10 * GIB
    serve(world, "a")
    if why == "other key":
        node.shells = {**node.shells, B.launch_key(): "other"}
    elif why == "unknown":
        node.shells = {A.launch_key(): "k"}
    elif why == "in use":
        world.flying[next(iter(world.core.state.replicas))] = 1
    elif why == "pinned":
        world.core.state.models["a"].pinned = True
    world.run(1.0)
    world.want("b")
    world.run(5.0)
    assert not sent(world, RepointReplica)


def test_it_can_be_turned_off() -> None:
    world = world_of()
    world.core.state.shells = False
    serve(world, "a")
    world.want("b")
    world.run(40.0)
    assert "b" in world.hot()
    assert not sent(world, RepointReplica)


def test_an_agent_that_refuses_keeps_the_model_and_the_other_starts_plainly() -> None:
    world = world_of(refuses_repoint="it is not pointed at b any more: its canary failed")
    serve(world, "a")
    world.want("b")
    world.run(4.0)
    kept = next(d for d in world.decided if d.action == "keep")
    assert "canary failed" in kept.reason
    assert len(sent(world, RepointReplica)) == 1
    world.run(45.0)
    assert world.hot() == {"b"}
    assert len(sent(world, StartReplica)) == 2


def test_an_agent_that_does_not_do_it_keeps_the_model() -> None:
    world = world_of(keeps=True)
    serve(world, "a")
    world.want("b")
    world.run(60.0)
    assert world.hot() == {"b"}
    assert len(sent(world, RepointReplica)) == 1
    assert len(sent(world, StartReplica)) == 2


def test_a_plan_that_nobody_waits_for_any_more_is_taken_back() -> None:
    world, replica = rising()
    assert (replica.model, replica.stage) == ("b", Stage.RISING)
    world.waiting.clear()
    world.run(1.0)
    assert (replica.model, replica.stage, replica.former) == ("a", Stage.READY, None)
    world.router_acks = True
    world.run(1.0)
    assert world.hot() == {"a"}
    assert not sent(world, RepointReplica)


def test_one_that_dies_before_it_is_told_is_what_it_was() -> None:
    world, replica = rising()
    one = world.nodes["n1"].replicas[replica.replica_id]
    one.phase, one.since, one.died = "backoff", world.now, "it crashed"
    world.run(0.5)
    assert replica.model == "a"
    world.router_acks = True
    one.phase = "failed"
    world.run(60.0)
    assert world.hot() == {"b"}


def test_an_engine_that_fails_at_it_is_started_plainly_for_the_new_model() -> None:
    world = world_of(repoint_s=9e9)
    serve(world, "a")
    world.want("b")
    world.run(3.0)
    (replica,) = world.core.state.replicas.values()
    one = world.nodes["n1"].replicas[replica.replica_id]
    assert (replica.stage, one.phase) == (Stage.WAKING, "waking")
    one.repoint, one.phase, one.since, one.restarts = None, "starting", world.now, 1
    world.run(35.0)
    assert world.hot() == {"b"}
    assert (replica.model, replica.former) == ("b", None)


def test_failed_canaries_of_shells_are_no_fault_of_the_device() -> None:
    world = world_of()
    node = world.nodes["n1"]
    for model in ("a", "b"):
        serve(world, model)
        node.disabled = {model: {"shell": "its canary failed: another token"}}
        world.run(2.0)
        assert ("disable", model) in world.actions()
    assert not world.quarantined


def test_the_next_leader_believes_the_agent() -> None:
    world = world_of(repoint_s=2.0)
    serve(world, "a")
    world.want("b")
    world.run(1.5)
    assert sent(world, RepointReplica)
    stored = tuple(model.stored for model in world.core.state.models.values())
    world.elect(models=stored)
    world.run(6.0)
    assert world.hot() == {"b"}
    (replica,) = world.core.state.replicas.values()
    assert replica.model == "b"


def test_what_its_agent_points_elsewhere_serves_neither_model_meanwhile() -> None:
    """A leader before this one had it pointed at a third model, which its agent goes on with."""
    world = world_of(A, B, C, shells=(A, B, C), keeps=True)
    serve(world, "a")
    world.want("b")
    world.run(0.5)
    (replica,) = world.core.state.replicas.values()
    assert (replica.model, replica.stage) == ("b", Stage.WAKING)
    one = world.nodes["n1"].replicas[replica.replica_id]
    one.start = replace(one.start, spec=C)
    world.waiting.clear()  # else it is pointed at `b` again
    world.report()
    world.apply(m.HeartbeatSeen(now=world.now, heartbeat=world.nodes["n1"].heartbeat(world.now)))
    assert (replica.model, replica.former) == ("c", None)
    assert "a" not in world.hot()


def test_a_command_that_was_lost_is_repeated() -> None:
    world = world_of()
    serve(world, "a")
    world.lossy = Random(3)
    world.want("b")
    for _ in range(200):
        world.run(0.5)
        if "b" in world.hot():
            break
    assert world.hot() == {"b"}


def test_its_model_may_be_removed_while_it_is_pointed_elsewhere() -> None:
    world = world_of()
    serve(world, "a")
    world.router_acks = False
    world.want("b")
    world.run(0.5)
    world.apply(m.ModelRemoved(now=world.now, name="a"))
    world.waiting.clear()
    world.router_acks = True
    world.run(10.0)
    assert not world.core.state.replicas
