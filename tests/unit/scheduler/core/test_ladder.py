"""The warmth ladder in the scheduler: who sleeps, how deep, who is woken, and what is booked."""

from __future__ import annotations

import pytest

from runtime.wire.agent_messages import SleepReplica, StopReplica, WakeReplica
from scheduler.policy.ladder import call_chance
from scheduler.state import messages as m
from scheduler.state.cluster import Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, spec


def sleepy(gib: int = 24, **fields: object) -> FakeNode:
    values = {"rungs": (1, 2), "residue": GIB, "host_budget": 64 * GIB, **fields}
    return FakeNode("n1", {"g0": gib * GIB}, **values)  # type: ignore[arg-type]


def stages(world: World) -> dict[str, Stage]:
    return {r.model: r.stage for r in world.core.state.replicas.values()}


def test_an_evicted_model_sleeps_and_is_woken_in_its_place() -> None:
    world = World(sleepy())
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(6)
    assert stages(world) == {"a": Stage.ASLEEP, "b": Stage.READY}
    assert world.route("a").warmth == "asleep"
    world.want("a")
    world.run(6)
    assert stages(world) == {"a": Stage.READY, "b": Stage.ASLEEP}
    assert world.nodes["n1"].started == ["a-1-1", "b-1-2"]  # the switch started nothing
    (wake,) = [c for c in world.sent if isinstance(c, WakeReplica)]
    assert (wake.replica_id, wake.reason, wake.cause) == (
        "a-1-1", "woken after evicting b", "1 request waiting",
    )  # fmt: skip


def waking_a(wake_s: float) -> World:
    """`a` has been waking for 2 s, and takes so many; `c` has no room beside it."""
    node = sleepy()
    world = World(node)
    world.put(spec("a", 20), spec("b", 20), spec("c", 20))
    for name in "ab":
        world.want(name)
        world.run(6)
    node.wake_s = wake_s
    world.want("a")
    world.run(2)
    assert stages(world)["a"] is Stage.WAKING
    return world


@pytest.mark.parametrize(("wake_s", "gives_way"), [(25.0, True), (4.0, False)])
def test_a_long_wake_that_nobody_waits_for_gives_way(wake_s: float, gives_way: bool) -> None:
    """Its engine is stopped then, so a short one is waited for: it sleeps again at once."""
    world = waking_a(wake_s)
    world.waiting.clear()  # its caller hangs up
    world.report()
    world.want("c")
    world.run(14)
    assert stages(world)["c"] is Stage.READY
    stopped = [c.replica_id for c in world.sent if isinstance(c, StopReplica)]
    assert ("a-1-1" in stopped) is gives_way
    assert ("a" in stages(world)) is not gives_way


def test_a_long_wake_that_somebody_waits_for_goes_on() -> None:
    world = waking_a(wake_s=25.0)
    world.want("c")
    world.run(14)
    assert stages(world)["a"] is Stage.WAKING


def test_what_a_sleeper_keeps_stays_booked() -> None:
    world = World(sleepy(22, residue=3 * GIB))
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b", wait_s=100.0)  # for as long as stopping a sleeper may cost
    world.run(15)  # b fits only where a is gone: a sleeper would keep 3 of the 22 GiB
    assert stages(world) == {"b": Stage.READY}


def test_an_idle_model_steps_down_one_rung_at_a_time() -> None:
    world = World(sleepy())
    world.put(spec("a", 8, idle_s=10, asleep_s=30))
    world.want("a")
    world.run(5)
    world.run(14)
    assert stages(world) == {"a": Stage.ASLEEP}
    world.run(20)
    assert stages(world) == {"a": Stage.ASLEEP}
    world.run(20)
    assert stages(world) == {}
    reasons = [d.reason for d in world.decided if d.action in ("sleep", "stop")]
    assert reasons == ["idle for 10 s", "asleep and unused for 30 s"]


def test_sleep_switched_off_stops_instead() -> None:
    world = World(sleepy(rungs=()))
    world.put(spec("a", 8, idle_s=10))
    world.want("a")
    world.run(20)
    assert stages(world) == {}
    assert not [c for c in world.sent if isinstance(c, SleepReplica)]


def test_host_memory_is_booked_and_never_over_committed() -> None:
    world = World(sleepy(24, host_budget=25 * GIB))
    world.put(*(spec(name, 20) for name in "abc"))
    for name in "abc":
        world.want(name)
        world.run(6)
    levels = {r.model: r.sleep_level for r in world.core.state.replicas.values()}
    assert levels == {"a": 1, "b": 2, "c": 0}  # room for one at level 1: the next drops weights
    assert world.core.state.nodes["n1"].host_free() == 5 * GIB


def test_without_host_memory_or_level_2_a_victim_stops() -> None:
    world = World(sleepy(rungs=(1,), host_budget=0))
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(6)
    assert stages(world) == {"b": Stage.READY}


def test_sleepers_give_way_before_anyone_is_refused() -> None:
    world = World(sleepy(24, residue=4 * GIB))
    world.put(spec("a", 12), spec("b", 12), spec("c", 22))
    for name in "ab":
        world.want(name)
        world.run(5)
    world.want("c", wait_s=100.0)
    world.run(15)
    assert stages(world)["c"] is Stage.READY  # two residues of 4 GiB would have left it no room


def test_an_awake_time_decides_between_waking_and_starting() -> None:
    world = World(sleepy(24), FakeNode("n2", {"g0": 24 * GIB}, rungs=(1, 2)))
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    (a,) = world.core.state.replicas.values()
    world.want("b")
    world.run(5)
    assert stages(world) == {"a": Stage.READY, "b": Stage.READY}  # room elsewhere: nobody sleeps
    assert a.stage is Stage.READY


def test_a_sleep_that_fails_for_work_in_flight_leaves_the_replica_serving() -> None:
    world = World(sleepy())
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    world.run(5)
    node = world.nodes["n1"]
    obey = node.obey
    # The agent accepts, then finds work and stays ready.
    node.obey = lambda command, now: (  # type: ignore[method-assign]
        None if isinstance(command, SleepReplica) else obey(command, now)
    )
    while ("stay", "a") not in world.actions():
        world.run(0.5)
        assert world.now < 1100
    assert stages(world) == {"a": Stage.READY}
    assert world.hot() == {"a"}
    assert not [c for c in world.sent if isinstance(c, StopReplica)]


def test_a_replica_that_dies_asleep_is_cleared_and_the_model_may_start_again() -> None:
    world = World(sleepy())
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    world.run(14)
    assert stages(world) == {"a": Stage.ASLEEP}
    replica = next(iter(world.nodes["n1"].replicas.values()))
    replica.phase, replica.reason, replica.since = "failed", "killed", world.now
    world.run(5)
    assert stages(world) == {}
    assert world.route("a").refusal is None  # no failed start: the model need not rest
    world.want("a")
    world.run(5)
    assert world.hot() == {"a"}


def test_a_request_for_a_model_on_its_way_to_sleep_wakes_it() -> None:
    node = sleepy()
    node.sleep_s = 4
    world = World(node, FakeNode("n2", {"g0": 24 * GIB}))
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    while Stage.SLEEPING not in stages(world).values():
        world.run(1)
    world.want("a")
    world.run(8)
    assert len(node.started) + len(world.nodes["n2"].started) == 1
    assert world.hot() == {"a"}


def test_a_changed_spec_ends_sleepers_of_the_old_one() -> None:
    world = World(sleepy())
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    world.run(14)
    world.put(spec("a", 20, idle_s=5, engine_args={"x": 1}))
    world.run(4)
    assert stages(world) == {}
    assert [c for c in world.sent if isinstance(c, StopReplica)]


def test_a_new_leader_adopts_sleepers_with_their_bookings() -> None:
    world = World(sleepy())
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    world.run(14)
    models = tuple(model.stored for model in world.core.state.models.values())
    world.elect(models)
    (a,) = world.core.state.replicas.values()
    assert (a.stage, a.sleep_level, a.residue, a.host_booked) == (
        Stage.ASLEEP, 1, GIB, 20 * GIB,
    )  # fmt: skip
    world.want("a")
    world.run(3)
    assert world.hot() == {"a"}


def test_unload_stops_a_sleeper() -> None:
    world = World(sleepy())
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    world.run(14)
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(4)
    assert not world.nodes["n1"].replicas


def test_the_worked_example_of_the_cost_formula() -> None:
    assert call_chance(200) == pytest.approx(0.75)
    assert call_chance(0) == 1.0
