"""The scheduler's core in random clusters under random faults.

Invariants are checked after every event, and in the end demand is met.
"""

from __future__ import annotations

from random import Random
from typing import Any

from msgspec.structs import replace

from runtime.wire.agent_messages import CachedModel
from runtime.wire.model_spec import Placement
from scheduler.state import messages as m
from scheduler.state.cluster import Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, spec

SEEDS = range(300)
QUICK_SEEDS = SEEDS[:40]  # those of the quick tests: a seed costs a sixth of a second
OTHER_SEEDS = SEEDS[40:]


def random_world(random: Random) -> World:
    nodes = [
        FakeNode(
            f"n{i}",
            {f"g{j}": random.choice([24, 40, 80]) * GIB for j in range(random.randint(1, 3))},
            start_s=random.uniform(0.5, 6),
            stop_s=random.uniform(0.2, 4),
            sleep_s=random.uniform(0.2, 3),
            wake_s=random.uniform(0.2, 3),
            rungs=random.choice([(), (1, 2), (2,)]),
            residue=random.choice([0, 1, 3]) * GIB,
            host_budget=random.choice([0, 20, 200]) * GIB,
            preemptible=random.random() < 0.3,
            cached=tuple(
                CachedModel(source=f"/models/m{j}", disk_bytes=random.choice([1, 6, 18]) * GIB)
                for j in range(4)
                if random.random() < 0.7
            ),
        )
        for i in range(random.randint(1, 3))
    ]
    world = World(*nodes, lossy=random, min_dwell_s=random.choice([0.0, 3.0]))
    for i in range(random.randint(1, 6)):
        tp = random.choice([1, 1, 1, 2])
        one = spec(
            f"m{i}", random.choice([2, 8, 20, 30]) * tp, tensor_parallel_size=tp,
            max_replicas=random.randint(1, 3), idle_s=random.choice([5, 20, 100]),
            target_concurrency=random.choice([1, 8]), priority=random.randint(-1, 1),
            asleep_s=random.choice([10, 1000]), staged_s=random.choice([10, 1000]),
            placement=Placement(spread=random.choice(["prefer", "off"])),
        )  # fmt: skip
        one = replace(one, source=f"/models/m{i}")
        world.put(one)
        for node in nodes:
            if random.random() < 0.7:
                kind = f"{one.booked_bytes()} {tp} {random.choice('pq')}"
                node.shells[one.launch_key()] = kind
    return world


def disturb(world: World, random: Random) -> None:
    """One thing that happens in a cluster's life."""
    state = world.core.state
    names = sorted(state.models)
    replicas = sorted(state.replicas)
    node = random.choice(sorted(world.nodes.values(), key=lambda n: n.node_id))
    match random.randrange(19):
        case 0 | 1 | 2 | 3:
            wait_s = random.choice([0.0, 10.0, 40.0, 100.0])
            world.want(random.choice(names), random.randint(1, 20), wait_s)
        case 13:
            node.preempted_in_s = None if node.preempted_in_s else random.choice([5.0, 60.0])
        case 14:
            device_id = random.choice(sorted(node.devices))
            if random.random() < 0.5:
                node.xid = {device_id: 79}
            else:
                node.xid = {}
                world.apply(release(world, node.node_id, device_id))
        case 15:
            floor: Any = random.choice(["hot", "asleep", "staged", None])
            world.apply(m.FloorSet(now=world.now, model=random.choice(names), floor=floor))
        case 17:
            node.refuses_repoint = random.choice([None, None, "it is draining"])
        case 18:
            node.keeps = random.random() < 0.3
            node.repoint_s = random.choice([0.2, 3.0])
        case 16:
            node.deaf_to_staging = random.random() < 0.5
            node.disabled = {random.choice(names): {"asleep-1": "its canary failed"}}
        case 4 if replicas:
            world.flying[random.choice(replicas)] = random.randint(1, 5)
        case 5 | 6:
            world.flying.clear()
        case 7:
            node.up = not node.up
            if node.up and random.random() < 0.5:
                node.boot_id, node.seq = node.boot_id + 1, 0
        case 8 if node.replicas:  # a process dies and its agent forgets it
            node.replicas.pop(random.choice(sorted(node.replicas)))
        case 12 if node.replicas:  # an engine dies: its agent restarts it, but not a sleeper
            replica = node.replicas[random.choice(sorted(node.replicas))]
            if replica.phase in ("ready", "waking"):
                replica.phase, replica.since, replica.sleep_level = "starting", world.now, 0
            elif replica.phase in ("asleep", "sleeping"):
                replica.phase, replica.since, replica.sleep_level = "failed", world.now, 0
        case 9:
            old = state.models[random.choice(names)].spec
            world.put(spec(old.name, random.choice([2, 8, 20]), engine_args={"x": random.random()}))
        case 10:
            models = tuple(model.stored for model in state.models.values())
            kept = tuple((n, d, why) for (n, d), why in sorted(world.quarantined.items()))
            world.elect(models, quarantined=kept)
        case 11:
            cordoned = random.random() < 0.3
            drain = random.random() < 0.5
            deadline_s = random.choice([0.0, 10.0, 300.0])
            world.apply(
                m.CordonSet(
                    now=world.now, node_id=node.node_id, cordoned=cordoned, drain=drain,
                    deadline_s=deadline_s,
                )
            )  # fmt: skip


def release(world: World, node_id: str, device_id: str) -> m.QuarantineSet:
    return m.QuarantineSet(now=world.now, node_id=node_id, device_id=device_id, reason=None)


def live_through(seed: int) -> None:
    """Put a cluster through its life. Raises AssertionError where a rule is broken."""
    random = Random(seed)
    world = random_world(random)
    for _ in range(25):
        disturb(world, random)
        world.run(random.choice([0.5, 1.0, 3.0, 8.0]))
    settle(world)
    for name in sorted(world.core.state.models):
        for waited_s in (0.0, 20.0):  # for sleepers' sake it may wait a little
            if name in world.waiting or not waited_s:
                world.want(name, wait_s=waited_s)
                world.run(20 + waited_s)
        # The router lets go of a request only when a replica serves it or it is refused.
        assert name not in world.waiting, f"{name}: {world.route(name)}"
    on_nodes = {rid for node in world.nodes.values() for rid in node.replicas}
    assert on_nodes == {
        r.replica_id for r in world.core.state.replicas.values() if r.stage is not Stage.PLANNED
    }


def settle(world: World) -> None:
    """The faults end."""
    world.lossy = None
    world.flying.clear()
    world.waiting.clear()
    for node in world.nodes.values():
        node.up, node.preempted_in_s, node.xid, node.disabled = True, None, {}, {}
    world.run(2)
    for node_id, device_id in sorted(world.quarantined):
        world.apply(release(world, node_id, device_id))
    for node in world.nodes.values():
        world.apply(m.CordonSet(now=world.now, node_id=node.node_id, cordoned=False))
    for name in sorted(world.core.state.models):
        world.apply(m.FloorSet(now=world.now, model=name, floor=None))
    world.run(30)
