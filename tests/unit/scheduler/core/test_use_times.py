"""The scheduler's core: when a replica was last used, by which the coldest is found."""

from __future__ import annotations

import pytest

from runtime.wire.routes import DemandReport
from scheduler.state import messages as m
from tests.kits.scheduler_world import World, one_gpu, spec


def test_a_short_call_that_only_its_router_saw_counts_as_a_use() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in ("a", "b"):
        world.want(name)
        world.run(5)
        (replica,) = world.core.state.models[name].ready()
        world.nodes["n1"].replicas[replica.replica_id].used_at = world.now
    world.run(5)
    # between two looks of its agent a is called once more: the router says so at once
    (replica,) = world.core.state.models["a"].ready()
    world.flying[replica.replica_id] = 1
    world.report()
    world.flying.clear()
    world.run(1)
    world.want("c")
    world.run(6)
    assert world.hot() == {"a", "c"}


def test_the_coldest_is_told_by_when_requests_ended_not_by_when_it_was_heard() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(5)
    a, b = world.nodes["n1"].replicas["a-1-1"], world.nodes["n1"].replicas["b-1-2"]
    ended = world.now
    world.flying["b-1-2"] = 1  # heard as in flight for a while after it has ended
    world.run(1)
    world.flying.clear()
    a.used_at, b.used_at = ended + 0.2, ended + 0.1
    world.used |= {"a-1-1": ended + 0.2, "b-1-2": ended + 0.1}
    world.run(1)
    world.want("c")
    world.run(6)
    assert world.hot() == {"a", "c"}


def told(world: World, seq: int, sent_s: float, **used_at: float) -> None:
    """A report of another router that was made at `sent_s` by its clock, and is heard now."""
    report = DemandReport(
        router_id="far", boot_id=1, seq=seq, routes_version=2**60, sent_s=sent_s,
        idle_s={f"{name[0]}-1-{name[1]}": sent_s - at for name, at in used_at.items()},
    )  # fmt: skip
    world.apply(m.DemandSeen(now=world.now, report=report))


@pytest.mark.parametrize(("first", "second"), [("a1", "b2"), ("b2", "a1")])
@pytest.mark.parametrize("late_s", [0.0, 0.9])
@pytest.mark.parametrize("stale", [False, True])
def test_two_short_calls_100_ms_apart_keep_their_order(
    first: str, second: str, late_s: float, stale: bool
) -> None:
    """Neither was ever in flight when anyone reported, and the first is told of late.

    `stale`: the first one's engine was asked meanwhile, and its answer came late too.
    """
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in "ab":
        world.want(name)
        world.run(5)
    clock_s = world.now - 77.0  # the router's own
    told(world, 1, clock_s)
    world.run(1)
    world.now += late_s
    told(world, 2, clock_s + 1.0, **{first: clock_s + 0.9})
    if stale:
        node = world.nodes["n1"]
        node.replicas[f"{first[0]}-1-{first[1]}"].used_at = world.now
        world.apply(m.HeartbeatSeen(now=world.now, heartbeat=node.heartbeat(world.now)))
    world.now = max(world.now, 77.0 + clock_s + 1.01)
    told(world, 3, clock_s + 1.01, **{first: clock_s + 0.9, second: clock_s + 1.0})
    world.want("c")
    world.run(6)
    assert world.hot() == {"c", second[0]}


def test_what_a_router_that_is_gone_told_stays_true() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10))
    world.want("a")
    world.run(5)
    told(world, 1, 50.0, a1=50.0)
    at = world.now
    world.run(10)
    assert "far" not in world.core.state.routers
    replica = world.core.state.replicas["a-1-1"]
    assert replica.used_at == at
    assert list(replica.routed_at) == [""]


def test_the_engine_tells_of_uses_that_no_router_knows_of() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10))
    world.want("a")
    world.run(5)
    told(world, 1, 50.0, a1=40.0)
    world.nodes["n1"].replicas["a-1-1"].used_at = world.now
    at = world.now
    world.run(3)
    assert world.core.state.replicas["a-1-1"].used_at == at
