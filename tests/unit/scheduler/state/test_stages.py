"""The tables of a replica's stages: each edge is taken by the core, and no other is allowed."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest

from runtime.wire.agent_messages import CachedModel, Heartbeat, ReplicaPhase, StartReplica
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState, Replica, Stage
from scheduler.state.stages import EDGES, FOUND, LEAVING, SAID
from tests.kits.scheduler_world import GIB, FakeNode, FakeReplica, World, spec

ID = "a-1-99"
Edge = tuple[Stage, Stage | None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[Edge]:
    """The edges that replicas took."""
    found: set[Edge] = set()
    move, drop = Replica.move, ClusterState.drop

    def moved(replica: Replica, stage: Stage, now: float) -> None:
        before = replica.stage
        move(replica, stage, now)
        if before is not stage:
            found.add((before, stage))

    def dropped(state: ClusterState, replica: Replica) -> None:
        found.add((replica.stage, None))
        drop(state, replica)

    monkeypatch.setattr(Replica, "move", moved)
    monkeypatch.setattr(ClusterState, "drop", dropped)
    return found


def in_stage(stage: Stage, sleep_level: int = 0) -> tuple[World, Replica]:
    """A world whose scheduler has one replica, which its agent does not have."""
    world = World(FakeNode("n1", {"g0": 80 * GIB}, rungs=(1, 2), host_budget=99 * GIB))
    one = spec("a", idle_s=5.0, asleep_s=5.0)
    world.put(one)
    sleeps = stage in (Stage.ASLEEP, Stage.RISING, Stage.WAKING, Stage.SLEEPING)
    replica = Replica(
        ID, "a", "n1", ("g0",), 8 * GIB, one.launch_key(), stage, world.now, reason="put there",
        spec=one, used_at=world.now, sleep_level=2 if sleeps else sleep_level,
        lost_from=Stage.SENT if stage is Stage.UNKNOWN else None,
    )  # fmt: skip
    if stage not in (Stage.PLANNED, Stage.SENT, Stage.UNKNOWN):  # of a start that never arrived
        (replica.report,) = told(world, replica, "starting").replicas
        world.nodes["n1"].replicas.clear()
    world.core.state.add(replica)
    return world, replica


def told(world: World, replica: Replica, phase: str, sleep_level: int = 0) -> Heartbeat:
    """A heartbeat that tells of `phase`."""
    node = world.nodes["n1"]
    start = StartReplica(
        replica_id=ID, epoch=1, spec=replica.spec, device_ids=("g0",), device_bytes=8 * GIB,
        reason="",
    )  # fmt: skip
    node.replicas[ID] = FakeReplica(start, phase, since=world.now, sleep_level=sleep_level)
    return node.heartbeat(world.now)


def report(world: World, replica: Replica, phase: str, sleep_level: int) -> None:
    heartbeat = told(world, replica, phase, sleep_level)
    world.apply(m.HeartbeatSeen(now=world.now, heartbeat=heartbeat))


def ticks(world: World, after_s: float) -> None:
    world.now += after_s
    world.apply(m.Tick(now=world.now))


def beat(world: World) -> None:
    world.apply(m.HeartbeatSeen(now=world.now, heartbeat=world.nodes["n1"].heartbeat(world.now)))


def confirmed_and_missing(world: World, replica: Replica) -> None:
    replica.confirmed = (1, 0)
    beat(world)


def refuses_to_sleep(world: World, replica: Replica) -> None:
    replica.confirmed = (1, 0)
    report(world, replica, "ready", 0)


def resent(world: World, replica: Replica) -> None:
    beat(world)


def unloaded(world: World, replica: Replica) -> None:
    world.apply(m.UnloadAsked(now=world.now, model="a", replica_id=None))


def loaded(world: World, replica: Replica) -> None:
    world.apply(m.LoadAsked(now=world.now, model="a", replicas=1))


def unwanted(world: World, replica: Replica) -> None:
    world.put(spec("a", idle_s=5.0, asleep_s=5.0, priority=1))


def idle(world: World, replica: Replica) -> None:
    for _ in range(3):
        world.now += 4.0
        beat(world)
        world.apply(m.Tick(now=world.now))


def lost(world: World, replica: Replica) -> None:
    ticks(world, 11.0)
    ticks(world, 601.0)


def forgotten(world: World, replica: Replica) -> None:
    world.core.state.nodes["n1"].lost = True
    ticks(world, 601.0)


def pointed(world: World, replica: Replica) -> None:
    """Its engine serves another model next, and then does not."""
    other = spec("b")
    world.put(other)
    node = world.nodes["n1"]
    node.shells = {replica.launch_key: "k", other.launch_key(): "k"}
    node.cached = (CachedModel(source="/models/x", disk_bytes=1),)
    node.devices["g0"] = 9 * GIB
    world.router_acks = False
    phase = "asleep" if replica.stage is Stage.ASLEEP else "ready"
    report(world, replica, phase, 2 if phase == "asleep" else 0)
    world.want("b", wait_s=60.0)
    world.waiting.clear()
    world.report()
    ticks(world, 1.0)


HAPPENINGS: tuple[Callable[[World, Replica], None], ...] = (
    confirmed_and_missing, refuses_to_sleep, resent, unloaded, loaded, unwanted, idle, lost,
    forgotten, pointed,
)  # fmt: skip


def live_through_everything() -> None:
    """In each stage: whatever an agent may say, then whatever else may happen."""
    for stage in Stage:
        for phase in typing.get_args(ReplicaPhase):
            for level in (0, 1):
                world, replica = in_stage(stage)
                report(world, replica, phase, level)
        for happens in HAPPENINGS:
            for level in (0, 2) if stage in LEAVING else (0,):
                world, replica = in_stage(stage, level)
                happens(world, replica)


def test_each_edge_is_taken_and_no_other(seen: set[Edge]) -> None:
    live_through_everything()
    written = {(a, b) for table in (EDGES, FOUND) for a, after in table.items() for b in after}
    assert written - seen == set()
    assert seen - written == set()


def test_the_tables_have_every_stage_and_share_no_edge() -> None:
    assert set(EDGES) == set(FOUND) == set(Stage)
    assert all(not EDGES[stage] & FOUND[stage] for stage in Stage)
    assert all(None in EDGES[stage] | FOUND[stage] for stage in Stage)
    assert all(FOUND[stage] <= SAID | {None} for stage in Stage)


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        (Stage.READY, Stage.SENT),
        (Stage.STOPPING, Stage.READY),
        (Stage.UNROUTING, Stage.READY),
        (Stage.ASLEEP, Stage.UNROUTING),
        (Stage.WAKING, Stage.RISING),
    ],
)
def test_what_is_not_in_the_tables_is_refused(stage: Stage, after: Stage) -> None:
    world, replica = in_stage(stage)
    with pytest.raises(AssertionError, match=f"{ID}: {stage} -> {after}"):
        replica.move(after, world.now)
    assert replica.stage is stage
