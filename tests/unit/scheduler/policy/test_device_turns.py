"""Starts and wakes on one device: whose turn it is, and what waiting for it costs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from runtime.wire.agent_messages import MemoryEstimate, StartReplica
from runtime.wire.model_spec import ModelSpec
from scheduler.policy.device_turns import drain_s, queue_s
from scheduler.policy.ladder import EVICT_S
from scheduler.state import messages as m
from tests.kits.scheduler_world import GIB, FakeNode, World

WEIGHTS = MemoryEstimate(
    weights_bytes=2 * GIB, kv_bytes=GIB, overhead_bytes=GIB, total_bytes=4 * GIB, explanation=""
)


def gpus(count: int, kind: str = "nvml", **fields: object) -> FakeNode:
    devices = {f"g{i}": 80 * GIB for i in range(count)}
    values = {"kind": kind, "start_s": 20.0, "rungs": (1, 2), "host_budget": 400 * GIB, **fields}
    return FakeNode("n1", devices, **values)  # type: ignore[arg-type]


def world_of(node: FakeNode, *names: str, gib: int = 5, sized: bool = True, **settings) -> World:
    node.engines = {"vllm": "1", "stub": "1"}
    world = World(node, **settings)
    estimate = WEIGHTS if sized else None
    for name in names:
        one = ModelSpec(name=name, source="/models/x", engine="vllm", device_memory_bytes=gib * GIB)
        model = m.StoredModel(spec=one, estimate=estimate)
        world.apply(m.ModelPut(now=world.now, model=model))
    world.run(2)
    return world


def started(world: World) -> list[StartReplica]:
    return [c for c in world.sent if isinstance(c, StartReplica)]


def test_four_models_on_four_gpus_start_at_once_each_on_its_own() -> None:
    world = world_of(gpus(4), "a", "b", "c", "d")
    for name in "abcd":
        world.want(name)
    assert {r.start.device_ids for r in world.nodes["n1"].replicas.values()} == {
        ("g0",), ("g1",), ("g2",), ("g3",),
    }  # fmt: skip
    world.run(22)
    assert world.hot() == {"a", "b", "c", "d"}


def test_two_that_are_told_their_kv_cache_start_side_by_side_and_a_third_waits() -> None:
    world = world_of(gpus(1), "a", "b", "c")
    for name in "abc":
        world.want(name)
    world.run(3)
    assert len(world.nodes["n1"].started) == 2
    assert all(s.kv_bytes == 2 * GIB and not s.alone for s in started(world))
    world.run(40)
    assert world.hot() == {"a", "b", "c"}


def test_one_that_measures_what_is_free_starts_alone() -> None:
    world = world_of(gpus(1), "a", "b", sized=False)
    for name in "ab":
        world.want(name)
    world.run(3)
    assert len(world.nodes["n1"].started) == 1
    assert all(s.kv_bytes is None and s.alone for s in started(world))
    world.run(40)
    assert world.hot() == {"a", "b"}


def test_a_wake_does_not_wait_for_a_start() -> None:
    node = gpus(1)
    world = world_of(node, "sleeper", "b", "c")
    world.want("sleeper")
    world.run(25)
    world.want("sleeper", 0)
    (asleep,) = (r for r in world.core.state.replicas.values())
    world.run(400)  # its idle timer
    assert world.core.state.replicas[asleep.replica_id].stage == "asleep"
    world.want("b")
    world.want("c")
    world.run(2)
    world.want("sleeper")
    world.run(3)
    assert world.hot() == {"sleeper"}


def test_after_running_out_of_memory_the_engine_finds_out_itself() -> None:
    node = gpus(1, fails={"a": "CUDA out of memory"}, fail_kind="oom")
    world = world_of(node, "a")
    world.want("a")
    world.run(25)
    node.fails = {}
    world.run(15)
    world.want("a")  # those who waited were refused
    world.run(25)
    first, *_, last = started(world)
    assert (first.kv_bytes, first.alone) == (2 * GIB, False)
    assert (last.kv_bytes, last.alone) == (None, True)
    assert world.hot() == {"a"}


def test_company_that_costs_more_than_it_gains_is_not_sought() -> None:
    world = world_of(gpus(1), "a", "b")
    times = world.core.state.climb_times
    for beside, seconds in ((False, 20.0), (True, 31.0)):
        for _ in range(12):
            times.learn("nvml", "start-remote", 2 * GIB, seconds, beside)
    for name in "ab":
        world.want(name)
    world.run(3)
    assert len(world.nodes["n1"].started) == 1


def test_what_a_turn_costs() -> None:
    world = world_of(gpus(1), "a", "b", "c")
    state, node = world.core.state, world.core.state.nodes["n1"]
    assert queue_s(state, node, "g0", world.now) == 0.0
    world.want("a")
    world.run(15)
    world.want("b")
    begun = world.now
    # Until something was measured a start is expected to take 45 s and 1 s for 2 GiB from the disk.
    first, second = (min(r.since for r in node.replicas.values()), begun)
    left = 46.07 - (world.now - first)
    assert abs(queue_s(state, node, "g0", world.now) - left) < 1.5
    both = 46.07 - (world.now - second)
    assert abs(queue_s(state, node, "g0", world.now, alone=True) - both) < 1.5
    assert queue_s(state, node, "g0", world.now, wake=True) == 0.0


def test_how_long_what_leaves_still_serves() -> None:
    world = world_of(gpus(1), "a")
    world.want("a")
    world.run(25)
    world.want("a", 0)
    (replica,) = world.core.state.replicas.values()
    model = world.core.state.models["a"]
    model.busy_s, model.served = 350.0, 29.0
    assert drain_s(world.core.state, replica) == EVICT_S
    assert model.request_s == (350 + 10) / (29 + 1)
    world.flying[replica.replica_id] = 3
    world.report()
    model.busy_s, model.served = 350.0, 29.0
    assert drain_s(world.core.state, replica) == pytest.approx(EVICT_S + 12 * (1 + 1 / 2 + 1 / 3))


def test_the_mean_length_of_requests_follows_littles_law() -> None:
    world = world_of(gpus(1), "a")
    model = world.core.state.models["a"]
    assert model.request_s == 10.0  # nothing was seen
    for _ in range(29):
        model.saw(1, 3, 100 / 29)
    assert model.request_s == pytest.approx(310 / 30)
    for _ in range(1000):
        model.saw(1, 1, 2.0)
    assert model.request_s == pytest.approx(2.0, rel=0.1)  # what was long ago is forgotten


def test_a_start_does_not_wait_for_a_long_drain_where_another_device_is_free() -> None:
    world = world_of(gpus(2), "busy", "new", gib=50)
    world.want("busy")
    world.run(25)
    (busy,) = world.core.state.replicas.values()
    world.flying[busy.replica_id] = 8
    world.run(1)
    world.apply(m.UnloadAsked(now=world.now, model="busy"))  # it ends its requests first
    world.run(2)
    assert busy.leaving
    world.want("new")
    (new,) = (r for r in world.core.state.replicas.values() if r.model == "new")
    assert new.device_ids != busy.device_ids


def test_a_changed_spec_is_told_its_kv_cache_again() -> None:
    """What ran out of memory was the spec before it."""
    world = world_of(gpus(1), "a")
    model = world.core.state.models["a"]
    model.sizes_itself = True
    world.apply(m.ModelPut(now=world.now, model=model.stored))
    assert model.kv_bytes() is None  # the same one again
    changed = replace(model.stored.spec, device_memory_bytes=6 * GIB)
    world.apply(m.ModelPut(now=world.now, model=replace(model.stored, spec=changed)))
    assert model.kv_bytes() == 3 * GIB


@pytest.mark.parametrize(("declared_gib", "told_gib"), [(4, 1), (30, 27), (3, None)])
def test_the_kv_cache_that_a_start_is_told(declared_gib: int, told_gib: int | None) -> None:
    model = world_of(gpus(1), "a", gib=declared_gib).core.state.models["a"]
    assert model.kv_bytes() == (None if told_gib is None else told_gib * GIB)
