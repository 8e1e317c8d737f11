"""The scheduler's core: what routers are told of a model that waits or failed."""

from __future__ import annotations

from scheduler.admin import view_builders
from scheduler.state import messages as m
from tests.kits.scheduler_world import GIB, FakeNode, World, one_gpu, spec


def test_routers_are_told_at_once_of_what_their_part_of_the_spec_says() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(4)
    assert world.route("a").affinity == "prefix"
    world.put(spec("a", affinity="off", max_queue=7))
    assert (world.route("a").affinity, world.route("a").max_queue) == ("off", 7)
    assert world.nodes["n1"].started == ["a-1-1"]


def test_a_new_leader_publishes_even_an_empty_table() -> None:
    world = World(one_gpu())
    assert world.table is not None
    assert world.table.models == ()


def test_those_who_wait_are_told_after_whose_start_and_for_how_long() -> None:
    node = one_gpu()
    node.start_s = 10.0
    world = World(node, starts_at_once=1)
    world.put(spec("a"), spec("b"), spec("c"))
    for name in ("b", "c", "a"):  # each is measured once
        world.want(name)
        world.run(13)
        world.want(name, 0)
        world.apply(m.UnloadAsked(now=world.now, model=name))
        world.run(5)
    assert not world.hot()
    for name in ("a", "b", "c"):
        world.want(name)
    world.run(2)
    assert world.route("a").waiting_for == "starting on n1 (g0)"
    assert world.route("b").waiting_for == "queued after the start of a on n1 (g0)"
    assert world.route("c").waiting_for == "queued after the start of a on n1 (g0)"
    assert world.route("b").eta_s > world.route("a").eta_s + 5
    world.run(10)
    told = {name: world.route(name).waiting_for for name in ("b", "c")}
    assert sorted(told.values()) in (
        ["queued after the start of b on n1 (g0)", "starting on n1 (g0)"],
        ["queued after the start of c on n1 (g0)", "starting on n1 (g0)"],
    )


def test_routers_are_told_why_an_engine_died_at_its_first_restart() -> None:
    node = one_gpu()
    world = World(node)
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (replica,) = node.replicas.values()
    assert world.route("a").failures == {}
    replica.phase, replica.since = "starting", world.now
    replica.restarts, replica.reason = 1, "OutOfMemoryError: 2 GiB"
    world.run(1)
    assert world.route("a").failures == {"a-1-1": "OutOfMemoryError: 2 GiB"}
    assert "starting on n1 (g0) after it died: OutOfMemoryError" in world.route("a").waiting_for
    replica.phase, replica.reason = "ready", None
    world.run(1)
    assert world.route("a").failures == {}


def test_routers_are_told_where_the_engines_of_a_lost_node_were() -> None:
    """Those that serve, and one that left the table while a call was in flight there."""
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a"), spec("b"))
    world.want("a")
    world.want("b")
    world.run(5)
    assert world.table.lost == ()
    urls = {r.model: r.report.base_url for r in world.core.state.replicas.values()}
    (b,) = world.core.state.models["b"].replicas.values()
    world.flying[b.replica_id] = 1
    world.apply(m.ModelRemoved(now=world.now, name="b"))
    world.run(2)
    assert world.hot() == {"a"}
    for _ in range(2):  # a second loss is told as the first one was
        world.nodes["n1"].up = False
        world.run(15)
        assert world.table.lost == tuple(sorted(urls.values()))
        world.nodes["n1"].up = True
        world.run(2)
        assert world.table.lost == ()


def test_why_an_engine_died_is_told_at_its_first_death() -> None:
    node = one_gpu()
    world = World(node)
    world.put(spec("a", 10))
    world.want("a")
    world.run(5)
    replica = node.replicas["a-1-1"]
    replica.phase, replica.since, replica.restarts = "starting", world.now, 1
    replica.died = replica.reason = "CUDA error: an illegal memory access was encountered"
    world.run(0.5)
    assert [(d.action, d.reason) for d in world.decided[-1:]] == [("die", replica.died)]
    assert "illegal memory access" in (world.route("a").waiting_for or "")
    replica.reason = None
    world.run(5)
    shown = view_builders.replica(world.core, world.core.state.replicas["a-1-1"], world.now)
    assert shown.died == replica.died
    assert [d.action for d in world.decided].count("die") == 1
