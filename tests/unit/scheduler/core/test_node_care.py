"""Draining, preemption, quarantine, staging, ageing and moves: one rule a test."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from runtime.wire.agent_messages import CachedModel, MemoryEstimate, StageModels
from runtime.wire.model_spec import Placement
from scheduler.admin.views import PlanBody
from scheduler.admin.what_if import questions, what_if
from scheduler.core.decisions import Core
from scheduler.state import messages as m
from scheduler.state.cluster import Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, spec


def two_nodes(**fields: Any) -> World:
    return World(FakeNode("n1", {"g0": 24 * GIB}), FakeNode("n2", {"g0": 24 * GIB}), **fields)


def node_of(world: World, model: str) -> list[str]:
    return sorted(r.node_id for r in world.core.state.models[model].replicas.values())


def busy(world: World, model: str) -> str:
    """The model's only replica, with one request in flight from now on."""
    (replica,) = world.core.state.models[model].replicas.values()
    world.flying[replica.replica_id] = 1
    world.run(1)
    return replica.replica_id


# ------------------------------------------------------------------------------- draining


def test_a_called_model_serves_elsewhere_before_its_node_is_empty() -> None:
    world = two_nodes()
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (origin,) = node_of(world, "a")
    old = busy(world, "a")
    world.apply(
        m.CordonSet(now=world.now, node_id=origin, cordoned=True, drain=True, deadline_s=100)
    )
    for _ in range(10):
        assert world.route("a").endpoints, "the model was unreachable"
        world.run(0.5)
        if old not in {e.replica_id for e in world.route("a").endpoints}:
            break
    world.flying.pop(old)
    world.run(5)
    assert node_of(world, "a") == [{"n1": "n2", "n2": "n1"}[origin]]
    assert not world.nodes[origin].replicas


def test_what_finds_no_room_elsewhere_serves_until_the_deadline() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    busy(world, "a")
    world.apply(m.CordonSet(now=world.now, node_id="n1", cordoned=True, drain=True, deadline_s=20))
    world.run(15)
    assert world.hot() == {"a"}
    world.run(10)
    assert world.hot() == set()


def test_a_preempted_node_is_left_within_its_notice() -> None:
    world = two_nodes()
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (origin,) = node_of(world, "a")
    busy(world, "a")
    world.nodes[origin].preempted_in_s = 60.0
    world.run(8)
    world.flying.clear()
    world.run(5)
    assert node_of(world, "a") == [{"n1": "n2", "n2": "n1"}[origin]]


# ------------------------------------------------------------------------------- preemptible


def test_low_priority_prefers_spot_and_min_replicas_are_kept_off_it() -> None:
    spot = FakeNode("a-spot", {"g0": 24 * GIB}, preemptible=True)
    world = World(spot, FakeNode("b-safe", {"g0": 24 * GIB}))
    world.put(spec("low", 4, priority=-5), spec("high", 4), spec("kept", 4, min_replicas=1))
    for name in ("low", "high"):
        world.want(name)
    world.run(8)
    assert node_of(world, "low") == ["a-spot"]
    assert node_of(world, "high") == ["b-safe"]
    assert node_of(world, "kept") == ["b-safe"]


# ------------------------------------------------------------------------------- quarantine


def faulty(world: World, node_id: str, xid: int | None) -> None:
    world.nodes[node_id].xid = {"g0": xid} if xid else {}


def test_one_device_with_an_xid_is_set_aside_alone_and_can_be_released() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB, "g1": 24 * GIB}))
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    (replica,) = world.core.state.replicas.values()
    assert replica.device_ids == ("g0",)
    faulty(world, "n1", 79)
    world.run(8)
    (moved,) = world.core.state.models["a"].replicas.values() or (None,)
    assert moved is None or moved.device_ids == ("g1",)
    world.want("a")
    world.run(6)
    assert [r.device_ids for r in world.core.state.models["a"].ready()] == [("g1",)]
    node = world.core.state.nodes["n1"]
    assert "XID 79" in node.quarantine["g0"]
    assert world.quarantined == {("n1", "g0"): node.quarantine["g0"]}
    # gone again after the agent restarted: it is still not trusted
    faulty(world, "n1", None)
    world.run(2)
    assert node.capacity("g0") == 0
    world.apply(m.QuarantineSet(now=world.now, node_id="n1", device_id="g0", reason=None))
    assert node.capacity("g0") == 24 * GIB
    assert world.quarantined == {}


def test_a_released_device_is_not_set_aside_for_the_same_fault_again() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    faulty(world, "n1", 79)
    world.run(2)
    world.apply(m.QuarantineSet(now=world.now, node_id="n1", device_id="g0", reason=None))
    world.run(5)
    assert not world.core.state.nodes["n1"].quarantine
    faulty(world, "n1", 94)
    world.run(2)
    assert "XID 94" in world.core.state.nodes["n1"].quarantine["g0"]


def test_canaries_of_two_models_that_fail_on_one_device_are_the_devices_fault() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", 4), spec("b", 4))
    for name in ("a", "b"):
        world.want(name)
    world.run(8)
    for name in ("a", "b"):
        assert not world.core.state.nodes["n1"].quarantine
        world.nodes["n1"].disabled[name] = {"asleep-1": "its canary answered x, not y"}
        world.run(2)
    assert "canaries failed there: a, b" in world.core.state.nodes["n1"].quarantine["g0"]


def test_a_new_leader_knows_what_is_quarantined() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.elect(quarantined=(("n1", "g0", "XID 79"),))
    world.put(spec("a", 4))
    assert "no healthy device" in world.route("a").refusal


# ------------------------------------------------------------------------------- staging


def staged_node(**fields: object) -> FakeNode:
    # stub specs all have the source /models/x; the tests below give each its own
    return FakeNode("n1", {"g0": 24 * GIB}, host_budget=30 * GIB, **fields)  # type: ignore[arg-type]


def weighty(name: str, gib: int, **fields: object) -> m.StoredModel:
    estimate = MemoryEstimate(
        weights_bytes=gib * GIB, kv_bytes=0, overhead_bytes=0, total_bytes=20 * GIB, explanation=""
    )
    one = replace(spec(name, 20, **fields), source=f"/models/{name}")
    return m.StoredModel(spec=one, estimate=estimate)


def cache(world: World, *names: str, gib: int = 16) -> None:
    world.nodes["n1"].cached = tuple(
        CachedModel(source=f"/models/{name}", disk_bytes=gib * GIB) for name in names
    )


def test_a_stopped_models_weights_are_held_and_its_warmth_says_so() -> None:
    world = World(staged_node())
    world.apply(m.ModelPut(now=world.now, model=weighty("a", 16, idle_s=5, staged_s=60)))
    cache(world, "a")
    world.want("a")
    world.run(12)
    wishes = [c for c in world.sent if isinstance(c, StageModels)]
    assert [s.source for s in wishes[-1].models] == ["/models/a"]
    assert wishes[-1].models[0].bytes == 16 * GIB
    assert world.route("a").warmth == "staged"
    assert world.core.state.nodes["n1"].host_free() == 14 * GIB
    world.run(70)
    assert world.route("a").warmth == "cold"
    assert [c for c in world.sent if isinstance(c, StageModels)][-1].models == ()


@pytest.mark.parametrize(("resident", "held"), [(0, False), (16, True)])
def test_no_weights_are_read_again_to_be_held_while_a_start_reads(
    resident: int, held: bool
) -> None:
    node = FakeNode("n1", {"g0": 80 * GIB}, host_budget=30 * GIB)
    world = World(node)
    for name in "ab":
        world.apply(m.ModelPut(now=world.now, model=weighty(name, 16, idle_s=5)))
    node.cached = tuple(
        CachedModel(source=f"/models/{n}", disk_bytes=16 * GIB, resident_bytes=resident * GIB)
        for n in "ab"
    )
    world.want("a")
    world.run(5)
    node.start_s = 60.0
    world.want("b")
    world.run(12)  # a stops by its idle timer; b still starts
    assert [r.model for r in world.core.state.replicas.values()] == ["b"]
    assert bool(world.core.state.nodes["n1"].holds) is held


def test_a_node_that_missed_its_wish_is_told_again() -> None:
    world = World(staged_node())
    world.nodes["n1"].deaf_to_staging = True
    world.apply(m.ModelPut(now=world.now, model=weighty("a", 16, idle_s=5)))
    cache(world, "a")
    world.want("a")
    world.run(20)
    assert len([c for c in world.sent if isinstance(c, StageModels)]) > 2
    world.nodes["n1"].deaf_to_staging = False
    world.run(5)
    told = len([c for c in world.sent if isinstance(c, StageModels)])
    world.run(20)
    assert len([c for c in world.sent if isinstance(c, StageModels)]) == told


def test_a_sleeper_that_saves_more_takes_the_staged_models_memory() -> None:
    node = staged_node(rungs=(1,))
    world = World(node)
    for name in ("a", "b"):
        world.apply(m.ModelPut(now=world.now, model=weighty(name, 16, idle_s=5, asleep_s=4)))
    cache(world, "a", "b")
    world.want("a")
    world.run(20)  # hot, asleep, staged
    assert world.route("a").warmth == "staged"
    world.want("b")
    world.run(10)
    assert world.route("b").warmth == "asleep"  # 16 + 16 GiB are more than the host gives
    assert world.route("a").warmth == "cold"


def test_a_floor_of_staged_holds_a_model_that_nobody_ever_called() -> None:
    world = World(staged_node())
    world.apply(m.ModelPut(now=world.now, model=weighty("a", 16)))
    world.apply(m.FloorSet(now=world.now, model="a", floor="staged"))
    world.run(2)
    assert world.route("a").warmth == "staged"
    world.apply(m.FloorSet(now=world.now, model="a", floor=None))
    world.run(2)
    assert world.route("a").warmth == "staged"  # until staged_s is over
    assert not world.core.state.replicas


def test_a_removed_models_weights_are_let_go() -> None:
    world = World(staged_node())
    world.apply(m.ModelPut(now=world.now, model=weighty("a", 16)))
    world.apply(m.FloorSet(now=world.now, model="a", floor="staged"))
    world.run(2)
    world.apply(m.ModelRemoved(now=world.now, name="a"))
    world.run(2)
    assert world.core.state.nodes["n1"].host_free() == 30 * GIB


def test_a_start_goes_where_the_model_is_on_disk() -> None:
    n1, n2 = FakeNode("n1", {"g0": 24 * GIB}), FakeNode("n2", {"g0": 80 * GIB})
    world = World(n1, n2)
    world.apply(m.ModelPut(now=world.now, model=weighty("a", 16)))
    n2.cached = (CachedModel(source="/models/a", disk_bytes=16 * GIB),)
    world.run(1)
    world.want("a")
    world.run(4)
    assert node_of(world, "a") == ["n2"]  # n1 is the tighter fit, but would have to fetch it
    started = next(d for d in world.decided if d.action == "start")
    assert "n1: start (remote)" in started.considered[0]


# ------------------------------------------------------------------------------- fairness


def test_a_model_that_waits_long_gets_its_turn_from_one_that_is_always_busy() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    busy(world, "a")
    world.want("b", wait_s=5)
    world.run(40)
    assert world.hot() == {"a"}
    world.want("b", wait_s=31)
    world.run(1)
    assert world.hot() == set()  # a takes no new requests, and ends what it has
    assert any(
        r.stage in (Stage.UNROUTING, Stage.STOPPING) for r in world.core.state.replicas.values()
    )
    world.flying.clear()
    world.run(8)
    assert world.hot() == {"b"}


def test_a_model_loaded_for_later_makes_way_for_one_that_has_waited_long() -> None:
    """Seen in make sim, seed 2692: a request waited for 140 s for a replica nobody used."""
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", 20), spec("b", 20))
    world.apply(m.LoadAsked(now=world.now, model="a"))
    world.run(5)
    world.want("b", wait_s=10)
    world.run(5)
    assert world.hot() == {"a"}
    world.want("b", wait_s=31)
    world.run(8)
    assert world.hot() == {"b"}


def test_a_higher_class_takes_the_place_of_a_lower_one_that_is_busy() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", 20), spec("b", 20, priority=1))
    world.want("a")
    world.run(40)
    busy(world, "a")
    world.want("b")
    world.run(2)
    assert world.hot() == set()
    world.flying.clear()
    world.run(8)
    assert world.hot() == {"b"}


# ------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"labels": {"zone": "b"}}, "no node has the labels zone=b"),
        ({"devices": ("*H200*",)}, "there are: d"),
        ({"min_compute_capability": 9.0}, "min_compute_capability 9.0"),
    ],
)
def test_a_constraint_nobody_meets_is_refused_by_name(rules: dict, expected: str) -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", placement=Placement(**rules)))
    assert expected in world.route("a").refusal


def test_too_large_says_what_would_fit() -> None:
    world = World(FakeNode("n1", {f"g{i}": 24 * GIB for i in range(4)}))
    world.put(spec("a", 40))
    assert "tensor_parallel_size: 2 would fit" in world.route("a").refusal


def test_replicas_are_spread_over_nodes() -> None:
    world = World(
        FakeNode("n1", {"g0": 24 * GIB, "g1": 24 * GIB}), FakeNode("n2", {"g0": 80 * GIB})
    )
    world.put(spec("a", 20, max_replicas=2, target_concurrency=1))
    world.want("a", 2)
    world.run(6)
    assert node_of(world, "a") == ["n1", "n2"]


def test_tensor_parallel_prefers_nvlink_neighbours() -> None:
    node = FakeNode("n1", {f"g{i}": 24 * GIB for i in range(4)})
    node.links = {"g1": ("g3",), "g3": ("g1",)}
    world = World(node)
    world.put(spec("a", 40, tensor_parallel_size=2))
    world.want("a")
    world.run(4)
    (replica,) = world.core.state.replicas.values()
    assert replica.device_ids == ("g1", "g3")


# ------------------------------------------------------------------------------- defragmentation


def test_an_idle_model_moves_to_make_a_hole_rather_than_stop() -> None:
    big, small = FakeNode("n1", {"g0": 40 * GIB}), FakeNode("n2", {"g0": 24 * GIB})
    small.up = False
    world = World(big, small)
    world.put(spec("small", 20), spec("large", 36))
    world.want("small")
    world.run(6)
    assert node_of(world, "small") == ["n1"]
    small.up = True
    world.run(6)
    world.core.state.models["small"].footprint = None
    world.want("large")
    world.run(12)
    assert node_of(world, "large") == ["n1"]
    assert node_of(world, "small") == ["n2"]
    assert ("move", "small") in world.actions()


# ------------------------------------------------------------------------------- plan


def test_a_plan_says_what_would_happen_and_changes_nothing() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(8)
    body = PlanBody(load="b")
    answer = what_if(world.core, questions(world.core, body, world.now))
    assert [(s.action, s.model, s.goes_to) for s in answer.steps] == [
        ("evict", "a", "stopped"),
        ("start", "b", None),
    ]
    (wait_s,) = answer.expected_wait_s.values()
    assert wait_s > 3
    assert world.hot() == {"a"}
    assert node_of(world, "b") == []


def test_a_plan_to_remove_a_node_says_where_its_models_go() -> None:
    world = two_nodes()
    world.put(spec("a"))
    world.want("a")
    world.run(5)
    (origin,) = node_of(world, "a")
    busy(world, "a")
    body = PlanBody(remove_node=origin)
    answer = what_if(world.core, questions(world.core, body, world.now))
    assert [(s.action, s.node_id) for s in answer.steps] == [
        ("start", {"n1": "n2", "n2": "n1"}[origin])
    ]


def test_a_plan_for_what_never_fits_says_what_would_have_to_change() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    body = PlanBody(add=spec("huge", 100))
    answer = what_if(world.core, questions(world.core, body, world.now))
    assert "needs 100.0 GiB on one device" in answer.not_placed["huge"]
    assert "huge" not in world.core.state.models


def test_a_sleeper_that_is_stopped_holds_its_residue_until_it_is_seen_gone() -> None:
    node = FakeNode("n1", {"g0": 24 * GIB}, rungs=(2,), residue=2 * GIB, stop_s=5.0)
    world = World(node)
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    world.run(12)
    assert world.route("a").warmth == "asleep"
    seen = world.core.state.nodes["n1"]
    assert seen.physical("g0") == 2 * GIB
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    assert seen.physical("g0") == 2 * GIB  # told to stop, not gone
    world.run(10)
    assert seen.physical("g0") == 0


def test_a_leader_elected_again_has_no_wish_left_for_nodes_it_has_not_heard_yet() -> None:
    core, node = Core(), FakeNode("n1", {"g0": 24 * GIB}, staged=("/models/gone",))
    core.handle(m.Elected(now=0.0, term=1, models=(), known_nodes=("n1", "n2")))
    core.handle(m.HeartbeatSeen(now=1.0, heartbeat=node.heartbeat(1.0)))  # holds what nobody wants
    core.handle(m.Elected(now=2.0, term=2, models=(), known_nodes=("n1",)))
    commands = core.handle(m.Tick(now=60.0))  # nobody reports: it goes ahead
    assert not core.state.recovering
    assert not [c for c in commands if isinstance(c, m.Send)]
    told = core.handle(m.HeartbeatSeen(now=61.0, heartbeat=node.heartbeat(61.0)))
    sent = [c.command for c in told if isinstance(c, m.Send)]
    assert [c.models for c in sent if isinstance(c, StageModels)] == [()]
    assert len(sent) == 1
