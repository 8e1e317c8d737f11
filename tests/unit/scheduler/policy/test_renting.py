"""Sleepers and newcomers: how long one that is called waits before sleepers stop for it."""

from __future__ import annotations

import pytest

from runtime.wire.agent_messages import CachedModel, StopReplica
from scheduler.state import messages as m
from tests.kits.scheduler_world import GIB, FakeNode, World, spec

RESIDUE = 4 * GIB


def world_of(**fields: object) -> World:
    """Two sleepers of 4 GiB each on a device of 24 GiB, where `new` needs 20; one must stop."""
    values = {"rungs": (1, 2), "host_budget": 200 * GIB, "residue": RESIDUE, "start_s": 12.0}
    node = FakeNode("n1", {"g0": 24 * GIB}, **(values | fields))  # type: ignore[arg-type]
    node.cached = (CachedModel(source="/models/x", disk_bytes=10 * GIB, resident_bytes=0),)
    world = World(node)
    world.put(spec("a", 10, idle_s=5), spec("b", 10, idle_s=5), spec("new", 20))
    for name in "ab":
        world.want(name)
        world.run(15)
        world.want(name, 0)
    world.run(30)
    stages = {r.model: str(r.stage) for r in world.core.state.replicas.values()}
    assert stages == {"a": "asleep", "b": "asleep"}
    world.decided.clear()
    return world


def waited_s(world: World, count: int, limit_s: int = 60) -> int:
    """Seconds that so many callers of `new` wait until a sleeper stops."""
    for second in range(limit_s):
        world.want("new", count, wait_s=float(second))
        world.run(1)
        if any(d.action == "evict" for d in world.decided):
            return second
    return limit_s


def test_a_single_caller_waits_no_longer_than_half_of_its_own_start() -> None:
    assert 3 <= waited_s(world_of(), 1) <= 9  # its climb takes 13 s, and 3 s to make room


def test_many_callers_wait_less() -> None:
    assert waited_s(world_of(), 12) <= 2


def test_who_is_patient_hears_at_once_that_no_node_is_left() -> None:
    world = world_of()
    world.want("new", 1, wait_s=0.1)
    model = world.core.state.models["new"]
    assert model.patient_until > world.now
    world.apply(m.CordonSet(now=world.now, node_id="n1", cordoned=True))
    world.want("new", 1, wait_s=0.2)
    assert model.unfit == "no node is up that takes new replicas"


def test_an_operator_waits_for_nobody() -> None:
    world = world_of()
    world.apply(m.LoadAsked(now=world.now, model="new", replicas=1))
    world.run(2)
    assert any(d.action == "evict" for d in world.decided)


@pytest.mark.parametrize("called", ["a", "b"])
def test_a_sleeper_that_is_waited_for_stays(called: str) -> None:
    world = world_of()
    world.waiting |= {"new": 50, called: 1}
    world.wait_s |= {"new": 1.0, called: 0.5}
    world.report()
    stops = [c for c in world.sent if isinstance(c, StopReplica)]
    assert {c.replica_id.split("-")[0] for c in stops} == {"a", "b"} - {called}
