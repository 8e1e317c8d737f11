"""The scheduler's core: where a model is placed, and which one makes room for it."""

from __future__ import annotations

import pytest

from tests.kits.scheduler_world import GIB, FakeNode, World, one_gpu, spec


def test_a_third_model_takes_the_place_of_the_coldest() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(5)
    assert world.hot() == {"a", "b"}
    world.want("c")
    world.run(6)
    assert world.hot() == {"b", "c"}
    evicted = [d for d in world.decided if d.action == "evict"]
    assert [(d.model, d.reason) for d in evicted] == [("a", "makes room for c")]
    assert evicted[0].cause == "1 request waiting"


def test_a_replica_with_work_in_flight_is_never_evicted() -> None:
    world = World(one_gpu())
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 1
    world.run(1)
    world.want("b")
    world.run(30)
    assert world.hot() == {"a"}
    assert "a in use" in world.route("b").waiting_for
    world.flying.clear()
    world.run(6)
    assert world.hot() == {"b"}


def test_the_new_replica_is_not_started_before_the_memory_is_seen_free() -> None:
    node = one_gpu()
    node.stop_s = 7.0
    world = World(node)
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(6)
    assert node.started == ["a-1-1"]
    assert world.route("b").waiting_for == "queued after a, which makes room on n1 (g0)"
    world.run(6)
    assert node.started == ["a-1-1", "b-1-2"]


def test_tensor_parallel_takes_several_devices_of_one_node() -> None:
    world = World(
        FakeNode("n1", {"g0": 24 * GIB}), FakeNode("n2", {"g0": 24 * GIB, "g1": 24 * GIB})
    )
    world.put(spec("a", 40, tensor_parallel_size=2))
    world.want("a")
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    assert (replica.node_id, replica.device_ids, replica.bytes) == ("n2", ("g0", "g1"), 20 * GIB)


def test_best_fit_keeps_large_holes_whole() -> None:
    world = World(FakeNode("n1", {"big": 80 * GIB, "small": 24 * GIB}))
    world.put(spec("a", 10), spec("b", 70))
    world.want("a")
    world.want("b")
    world.run(8)
    where = {r.model: r.device_ids for r in world.core.state.replicas.values()}
    assert where == {"a": ("small",), "b": ("big",)}


def test_one_start_at_a_time_per_device() -> None:
    world = World(one_gpu(), starts_at_once=1)
    world.put(spec("a", 4), spec("b", 4))
    world.want("a")
    world.want("b")
    assert len(world.nodes["n1"].started) == 1
    world.run(8)
    assert world.hot() == {"a", "b"}


def test_a_request_that_goes_away_cancels_a_plan_that_has_not_begun() -> None:
    node = one_gpu()
    node.stop_s = 5
    world = World(node)
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.waiting.clear()
    world.run(10)
    assert node.started == ["a-1-1"]
    assert ("cancel", "b") in world.actions()


def hot_pair_and_a_failing_third(kind: str) -> World:
    """a and b are called every second; c is called all the time, and its first start fails."""
    node = one_gpu()
    node.fails, node.fail_kind = {"c": "the weights are no good"}, kind
    world = World(node)
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in "ab":
        world.want(name)
        world.run(5)
    for _ in range(120):
        for name in "abc":
            world.want(name)
        for route in map(world.route, "ab"):
            if route.endpoints:
                world.used[route.endpoints[0].replica_id] = world.now
        world.run(1)
    return world


@pytest.mark.parametrize("kind", ["bad_model", "oom"])
def test_a_model_that_cannot_start_takes_the_place_of_one_in_use_only_once(kind: str) -> None:
    world = hot_pair_and_a_failing_third(kind)
    evicted = [d.model for d in world.decided if d.reason == "makes room for c"]
    assert len(evicted) == 1
    assert world.hot() == {"a", "b"}
    assert world.core.state.models["c"].failures == 1


def test_a_failure_that_passed_lets_the_model_take_the_place_of_what_is_idle() -> None:
    node = one_gpu()
    node.fails, node.fail_kind = {"c": "a neighbour took the memory"}, "oom"
    world = World(node)
    world.put(spec("a", 10), spec("b", 10), spec("c", 10))
    for name in "ab":
        world.want(name)
        world.run(5)
    world.want("c")
    world.run(5)
    node.fails = {}
    world.run(10)
    for name in "ab":
        world.want(name)
        world.run(5)
    world.want("c")
    world.run(30)
    assert "c" in world.hot()


@pytest.mark.parametrize("size", [10, 20])
def test_a_start_that_nobody_waits_for_gives_way_at_once(size: int) -> None:
    """With room for both the second waits for its turn, without for the first one's memory."""
    node = one_gpu()
    node.start_s = 25.0
    world = World(node, starts_at_once=1)
    world.put(spec("slow", size), spec("next", size))
    world.want("slow")
    world.run(2)
    world.waiting.clear()  # its caller hangs up
    world.report()
    assert "slow-1-1" in node.replicas
    node.start_s = 1.0
    node.replicas["slow-1-1"].since = world.now + 25.0
    world.want("next")
    world.run(4)
    assert world.hot() == {"next"}
    assert "slow-1-1" not in node.replicas


def test_a_start_that_somebody_waits_for_keeps_its_turn() -> None:
    node = one_gpu()
    node.start_s = 5.0
    world = World(node)
    world.put(spec("slow", 10), spec("next", 10))
    world.want("slow")
    world.run(2)
    world.want("next")
    world.run(5)
    assert "slow" in world.hot()
    world.run(10)
    assert world.hot() == {"slow", "next"}


def test_lower_priority_goes_first() -> None:
    world = World(one_gpu())
    world.put(spec("a", 10, priority=5), spec("b", 10), spec("c", 10))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(5)
    world.want("c")
    world.run(6)
    assert world.hot() == {"a", "c"}  # a is colder, but b matters less


def test_the_evicted_set_is_minimal() -> None:
    world = World(one_gpu(24))
    world.put(spec("a", 4), spec("b", 4), spec("c", 16), spec("d", 16))
    for name in "abc":
        world.want(name)
        world.run(5)
    world.want("d")
    world.run(8)
    assert world.hot() == {"a", "b", "d"}  # a and b are colder, but too small to help
