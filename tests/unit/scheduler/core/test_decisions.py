"""The scheduler's core, one rule a test: when a replica starts, stays and stops."""

from __future__ import annotations

import pytest

from runtime.wire.agent_messages import StartReplica, StopReplica
from scheduler.state import messages as m
from scheduler.state.cluster import Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, one_gpu, spec


def test_one_waiting_request_starts_one_replica_and_routes_to_it() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a", 200)
    assert world.route("a").waiting_for == "starting on n1 (g0)"
    world.run(4)
    assert world.hot() == {"a"}
    assert world.nodes["n1"].started == ["a-1-1"]  # 200 requests, one start


def test_routers_confirm_before_a_replica_is_told_to_stop() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.router_acks = False
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(1)
    assert world.hot() == set()
    assert not [c for c in world.sent if isinstance(c, StopReplica)]
    world.router_acks = True
    world.run(1)
    assert [c for c in world.sent if isinstance(c, StopReplica)]


def test_a_dead_router_delays_a_stop_only_for_a_while() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.router_acks = False
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(8)
    assert not world.core.state.replicas


def test_idle_models_are_stopped_and_min_replicas_are_not() -> None:
    world = World(one_gpu())
    world.put(spec("a", 4, idle_s=10), spec("b", 4, idle_s=10, min_replicas=1))
    world.want("a")
    world.run(8)
    assert world.hot() == {"a", "b"}
    world.run(12)
    assert world.hot() == {"b"}
    assert ("stop", "a") in world.actions()


def test_starting_is_never_idle() -> None:
    node = one_gpu()
    node.start_s = 60
    world = World(node)
    world.put(spec("a", idle_s=1))
    world.want("a")
    world.run(30)
    world.waiting.clear()
    world.run(20)
    assert [r.stage for r in world.core.state.replicas.values()] == [Stage.STARTING]


def test_a_pinned_model_is_started_kept_and_never_evicted() -> None:
    world = World(one_gpu())
    world.put(spec("a", 20, idle_s=5), spec("b", 20))
    world.apply(m.PinSet(now=world.now, model="a", pinned=True))
    world.run(20)
    assert world.hot() == {"a"}
    world.want("b")
    world.run(20)
    assert world.hot() == {"a"}
    world.apply(m.PinSet(now=world.now, model="a", pinned=False))
    world.run(8)
    assert world.hot() == {"b"}


def test_concurrency_adds_replicas_up_to_the_maximum() -> None:
    world = World(FakeNode("n1", {f"g{i}": 24 * GIB for i in range(4)}))
    world.put(spec("a", 20, max_replicas=3, target_concurrency=10))
    world.want("a", 15)
    world.run(10)
    assert len(world.route("a").endpoints) == 2
    for replica in world.route("a").endpoints:
        world.flying[replica.replica_id] = 50
    world.run(10)
    assert len(world.route("a").endpoints) == 3


def test_a_spec_change_drops_no_replica_that_serves() -> None:
    world = World(one_gpu(48))
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 3
    world.run(1)
    world.put(spec("a", 20, engine_args={"max_model_len": 10}))
    world.run(1)
    assert [e.replica_id for e in world.route("a").endpoints] == ["a-1-1"]
    world.run(6)  # the new one serves: the old one drains
    assert [e.replica_id for e in world.route("a").endpoints] == ["a-1-2"]
    assert world.core.state.replicas["a-1-1"].stage in (Stage.UNROUTING, Stage.STOPPING)


def test_without_room_for_both_an_outdated_replica_goes_when_idle() -> None:
    world = World(one_gpu())
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 1
    world.run(1)
    world.put(spec("a", 20, engine_args={"max_model_len": 10}))
    world.run(20)
    assert world.hot() == {"a"}
    world.flying.clear()
    world.run(4)
    assert world.hot() == set()
    assert not world.core.state.replicas


def test_changing_what_no_process_sees_restarts_nothing() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.put(spec("a", idle_s=9999, priority=3))
    world.run(5)
    assert world.nodes["n1"].started == ["a-1-1"]
    assert world.hot() == {"a"}


def test_removing_a_model_drains_it() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.apply(m.ModelRemoved(now=world.now, name="a"))
    assert world.route("a") is None
    world.run(4)
    assert not world.core.state.replicas
    assert not world.nodes["n1"].replicas


def test_a_lowered_max_replicas_is_kept_though_nobody_calls() -> None:
    world = World(one_gpu(), FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a", min_replicas=2, max_replicas=2))
    world.run(5)
    assert len(world.core.state.replicas) == 2
    world.put(spec("a"))
    world.run(8)
    assert len(world.core.state.replicas) == 1


def test_commands_carry_the_term_and_the_cause() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a", 2)
    (start,) = [c for c in world.sent if isinstance(c, StartReplica)]
    assert (start.epoch, start.reason, start.cause) == (1, "best fit", "2 requests waiting")


@pytest.mark.parametrize("kind", ["start", "stop"])
def test_a_command_whose_effect_is_not_seen_is_repeated(kind: str) -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    if kind == "stop":
        world.want("a")
        world.run(5)
    node = world.nodes["n1"]
    obey, deliver = node.obey, world._deliver
    node.obey = lambda command, now: None  # type: ignore[method-assign]
    # Neither the command nor its answer arrives.
    world._deliver = lambda send: None  # type: ignore[method-assign]
    if kind == "start":
        world.want("a")
    else:
        world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(2)
    node.obey = obey  # type: ignore[method-assign]
    world._deliver = deliver  # type: ignore[method-assign]
    world.run(6)
    assert world.hot() == ({"a"} if kind == "start" else set())
    assert bool(node.replicas) is (kind == "start")


def test_an_unload_is_not_undone_by_the_requests_that_the_replica_is_finishing() -> None:
    world = World(one_gpu())
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    world.flying["a-1-1"] = 1
    world.run(1)
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(5)
    world.flying.clear()
    world.run(5)
    assert world.nodes["n1"].started == ["a-1-1"]
    assert not world.core.state.replicas
