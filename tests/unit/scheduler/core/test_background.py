"""Calls in no hurry (batches, mirrors), and engines with a queue of their own."""

from __future__ import annotations

import pytest

from tests.kits.scheduler_world import World, one_gpu, spec


def test_a_batch_takes_free_room() -> None:
    world = World(one_gpu())
    world.put(spec("batch", 20))
    world.background.add("batch")
    world.want("batch")
    world.run(5)
    assert world.hot() == {"batch"}


@pytest.mark.parametrize("in_a_hurry", [True, False])
def test_a_batch_takes_no_warm_models_place(in_a_hurry: bool) -> None:
    world = World(one_gpu())
    world.put(spec("warm", 20), spec("batch", 20))
    world.want("warm")
    world.run(5)
    if not in_a_hurry:
        world.background.add("batch")
    world.want("batch")
    world.run(20)
    assert world.hot() == ({"batch"} if in_a_hurry else {"warm"})
    if not in_a_hurry:
        assert "would cost others" in world.route("batch").waiting_for


@pytest.mark.parametrize("in_a_hurry", [True, False])
def test_a_model_busy_with_a_batch_only_makes_room_at_once(in_a_hurry: bool) -> None:
    world = World(one_gpu())
    world.put(spec("busy", 20), spec("called", 20))
    if not in_a_hurry:
        world.background.add("busy")
    world.want("busy")
    world.run(5)
    world.flying["busy-1-1"] = 1
    world.run(1)
    world.want("called")
    world.run(2)
    evicted = [d.model for d in world.decided if d.action == "evict"]
    assert evicted == ([] if in_a_hurry else ["busy"])
    world.flying.clear()  # its line ended within the grace time
    world.run(6)
    assert world.hot() == {"called"}


def test_routers_are_told_of_an_engine_with_a_queue_of_its_own() -> None:
    node = one_gpu()
    world = World(node)
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)

    def full() -> bool:
        (endpoint,) = world.route("a").endpoints
        return endpoint.full

    replica = node.replicas["a-1-1"]
    assert not full()
    replica.engine_waiting = 3
    world.run(0.5)
    assert not full()  # a moment is no queue
    world.run(0.5)
    assert full()
    version = world.table.version
    world.run(5)
    assert world.table.version == version  # said once
    replica.engine_waiting = 0
    world.run(0.5)
    assert not full()
