"""Forecasts and autoscaling inside the core, on the event sequences that show them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from runtime.wire.agent_messages import MemoryEstimate
from runtime.wire.model_spec import Autoscale, ScalePolicy, ScaleRules
from runtime.wire.routes import DemandReport, ModelDemand
from scheduler.state import messages as m
from tests.kits.scheduler_world import GIB, FakeNode, World, spec

PERIOD_S = 200.0


def call(world: World, model: str) -> bool:
    """One call, answered at once if the model is hot; whether it was."""
    was_hot = model in world.hot()
    world.want(model)
    deadline = world.now + 30
    while model not in world.hot() and world.now < deadline:
        world.run(0.5)
    (replica, *_) = world.core.state.models[model].ready()
    world.flying[replica.replica_id] = 1
    world.run(1)
    world.flying.clear()
    world.run(1)
    return was_hot


def every_period(world: World, model: str, times: int, period_s: float = PERIOD_S) -> list[bool]:
    """Calls at a steady pace; which of them found it hot."""
    found = []
    begin = world.now
    for index in range(times):
        world.run(max(0.5, begin + index * period_s - world.now), step=1.0)
        found.append(call(world, model))
    return found


def test_a_model_that_is_called_like_a_clock_is_warm_when_the_call_comes() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}, start_s=10.0))
    world.put(spec("a", 20, idle_s=20))
    found = every_period(world, "a", 16, period_s=900.0)
    assert not any(found[:4])
    assert all(found[-4:])
    tally = world.core.state.prewarms
    assert tally.hits >= 4
    assert tally.misses == 0
    world.run(300)  # between the calls it does not stay
    assert world.hot() == set()
    assert tally.hits == len([d for d in world.decided if d.cause.startswith("forecast")]) > 0


def test_what_is_called_often_stays_warm_beyond_its_idle_timer() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}, start_s=10.0))
    world.put(spec("a", idle_s=20))
    assert all(every_period(world, "a", 12)[-4:])
    assert not world.core.state.prewarms.started


@pytest.mark.parametrize("late", [False, True], ids=["all told", "last calls told late"])
def test_a_forecast_does_not_undo_an_operators_unload(late: bool) -> None:
    """Seen in test_must_hold: a busy model was unloaded, and started again in the same second."""
    world = World(FakeNode("n1", {"g0": 24 * GIB}, start_s=10.0))
    world.put(spec("a", idle_s=20))
    call(world, "a")
    told = itertools.count(1)

    def busy_router() -> None:
        seq = next(told)
        part = ModelDemand(model="a", arrived=5 * seq, idle_for_s=0.0)
        report = DemandReport(
            router_id="busy", boot_id=1, seq=seq, routes_version=10**12, models=(part,)
        )
        world.apply(m.DemandSeen(now=world.now, report=report))

    for _ in range(40):
        world.run(1.0)
        busy_router()
    decided = len(world.decided)
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    if late:
        world.run(0.5)
        busy_router()
    world.run(120)
    assert [d.action for d in world.decided[decided:]] == ["stop"]
    assert call(world, "a") is False  # a call does start it, and the forecast has a say again
    assert world.core.state.models["a"].forecast_at < float("inf")


def test_without_a_forecast_it_is_cold_every_time() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}, start_s=10.0))
    world.put(spec("a", idle_s=20, forecast="off"))
    assert not any(every_period(world, "a", 8))
    assert world.core.state.models["a"].arrivals is None


def test_a_prewarm_takes_nobodys_place() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}, start_s=10.0))
    world.put(spec("a", 20, idle_s=20), spec("b", 20, idle_s=10_000))
    every_period(world, "a", 8)
    assert call(world, "b") is False  # it took the room
    world.run(PERIOD_S * 3)
    assert world.hot() == {"b"}
    assert not [d for d in world.decided if d.action == "evict" and d.model == "b"]


def test_a_history_outlives_a_failover() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}, start_s=10.0))
    world.put(spec("a", idle_s=20))
    every_period(world, "a", 10)
    sketch = world.sketches["a"]
    models = tuple(model.stored for model in world.core.state.models.values())
    world.elect(models, sketches={"a": sketch})
    arrivals = world.core.state.models["a"].arrivals
    assert arrivals is not None
    assert arrivals.known(world.now)


def scaled(**rules: Any) -> Autoscale:
    none = ScaleRules(policies=(), stabilization_s=0.0)
    down = ScaleRules(
        policies=(ScalePolicy(type="count", value=1, period_s=30.0),), stabilization_s=60.0
    )
    return Autoscale(**{"up": none, "down": down, **rules})


def replicas_in(world: World) -> int:
    return len(world.core.state.models["a"].coming())


def test_too_many_replicas_step_down_one_by_one_and_end_their_requests_first() -> None:
    world = World(FakeNode("n1", {f"g{i}": 24 * GIB for i in range(4)}))
    world.put(spec("a", 20, max_replicas=4, target_concurrency=10, autoscale=scaled()))
    world.want("a", 40)
    world.run(8)
    assert replicas_in(world) == 4
    for replica in world.core.state.models["a"].ready():
        world.flying[replica.replica_id] = 2  # 8 in all: one would do
    began = world.now
    world.run(140)
    downs = [d.at for d in world.decided if d.cause == "autoscale"]
    assert downs[0] - began > 50  # the window began with the burst
    assert [round(b - a) for a, b in itertools.pairwise(downs)] == [30, 30]
    assert set(world.flying) <= set(world.core.state.replicas), "a busy replica was dropped"
    assert replicas_in(world) == 1


def test_after_a_failover_the_scale_is_held() -> None:
    world = World(FakeNode("n1", {f"g{i}": 24 * GIB for i in range(4)}))
    world.put(spec("a", 20, max_replicas=4, target_concurrency=10, autoscale=scaled()))
    world.want("a", 40)
    world.run(8)
    for replica in world.core.state.models["a"].ready():
        world.flying[replica.replica_id] = 2
    models = tuple(model.stored for model in world.core.state.models.values())
    world.elect(models)
    world.run(40)
    assert replicas_in(world) == 4
    assert not [d for d in world.decided if d.cause == "autoscale"]


def test_a_pinned_quiet_model_is_not_forecast_away() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a", 20, idle_s=5))
    world.apply(m.PinSet(now=world.now, model="a", pinned=True))
    every_period(world, "a", 6)
    world.run(60)
    assert world.hot() == {"a"}


def counted(world: World, seq: int, arrived: int, boot_id: int = 1) -> float:
    """What the history has counted after one more report of a router that counts calls."""
    part = ModelDemand(model="a", in_flight=1, arrived=arrived, idle_for_s=0.0)
    report = DemandReport(
        router_id="counting", boot_id=boot_id, seq=seq, routes_version=0, models=(part,)
    )
    world.apply(m.DemandSeen(now=world.now, report=report))
    arrivals = world.core.state.models["a"].arrivals
    assert arrivals is not None
    return round(arrivals.recent)


def test_calls_are_counted_once_also_by_a_new_leader_and_a_new_router() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}))
    world.put(spec("a"))
    # 500 calls came before this leader: when, it cannot know
    assert counted(world, 1, 500) == 1
    assert counted(world, 2, 503) == 4
    assert counted(world, 2, 503) == 4  # the same report again
    assert counted(world, 1, 2, boot_id=2) == 6


def stand_by(node: FakeNode) -> World:
    return World(node, stand_by=True)


def test_a_new_model_is_started_once_and_sleeps() -> None:
    world = stand_by(FakeNode("n1", {"g0": 24 * GIB}, rungs=(1,), host_budget=64 * GIB))
    world.put(spec("a", 8), spec("b", 8), spec("c", 8))
    world.run(60)
    assert {r.name: r.warmth for r in world.table.models} == dict.fromkeys("abc", "asleep")
    started = [d for d in world.decided if d.action == "start"]
    assert {d.cause for d in started} == {"stand-by"}
    assert len(started) == 3
    world.want("a")
    world.run(2)
    assert world.hot() == {"a"}  # the first caller waited for a wake only


def test_standing_by_takes_nobodys_place_and_is_not_done_twice() -> None:
    world = stand_by(FakeNode("n1", {"g0": 24 * GIB}))  # its engines can't sleep
    world.put(spec("a", 20, idle_s=1000))
    world.want("a")
    world.run(5)
    world.put(spec("b", 20, idle_s=1000))
    world.run(60)
    assert world.hot() == {"a"}  # b found no free room
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(60)
    assert world.hot() == set()  # b was started, and stopped soon: nobody called it
    assert [d.model for d in world.decided if d.cause == "stand-by"].count("b") == 1


def test_without_stand_by_nothing_starts_by_itself() -> None:
    world = World(FakeNode("n1", {"g0": 24 * GIB}, rungs=(1,), host_budget=64 * GIB))
    world.put(spec("a", 8))
    world.run(60)
    assert not world.core.state.replicas


@pytest.mark.parametrize(("host_gib", "stands_by"), [(40, True), (30, False)])
def test_nothing_stands_by_where_the_hosts_could_not_hold_nearly_all(
    host_gib: int, stands_by: bool
) -> None:
    """Three models of 16 GiB of weights: up to 1.3 times the hosts' budgets."""
    world = stand_by(
        FakeNode("n1", {"g0": 80 * GIB}, rungs=(1, 2), host_budget=host_gib * GIB, start_s=1.0)
    )
    estimate = MemoryEstimate(
        weights_bytes=16 * GIB, kv_bytes=0, overhead_bytes=0, total_bytes=20 * GIB, explanation=""
    )
    for name in "abc":
        stored = m.StoredModel(spec=spec(name, 20), estimate=estimate)
        world.apply(m.ModelPut(now=world.now, model=stored))
    world.run(8)
    assert bool(world.nodes["n1"].started) is stands_by
