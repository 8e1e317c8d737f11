"""The faults that are injected into a simulated cluster: each maker gives what one does. Pure."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from scheduler.sim.network import FAIR, Weather

if TYPE_CHECKING:
    from scheduler.sim.simulator import Simulation

Act = Callable[["Simulation"], object]


def lose_node(node_id: str) -> Act:
    """The node goes down; its engines die, and their connections break."""
    return lambda sim: sim.lose_node(node_id)


def vanish_node(node_id: str) -> Act:
    """The node goes down without a word: routers learn it from the scheduler or TCP's limit."""
    return lambda sim: sim.vanish_node(node_id)


def return_node(node_id: str) -> Act:
    """The node boots again; its agent finds the records of engines that are dead."""

    def act(sim: Simulation) -> None:
        if not sim.nodes[node_id].up:
            sim.return_node(node_id)

    return act


def restart_agent(node_id: str) -> Act:
    """The agent's process restarts; its engines go on and are adopted."""

    def act(sim: Simulation) -> None:
        if sim.nodes[node_id].up:
            sim.return_node(node_id)

    return act


def weather(kind: Weather) -> Act:
    """From now on messages fare like that."""

    def act(sim: Simulation) -> None:
        sim.network.weather = kind

    return act


def fair() -> Act:
    """Every message arrives."""
    return weather(FAIR)


def slow_disk(node_id: str, rate: float) -> Act:
    """The node's disk reads at `rate` bytes per second from now on."""
    return lambda sim: sim.nodes[node_id].set_disk_rate(rate)


def fail_over(zombie_s: float, torn: tuple[str, ...] = ()) -> Act:
    """A new leader; the old one goes on deciding for `zombie_s`, and nodes but those of `torn`
    go on following it."""
    return lambda sim: sim.fail_over(zombie_s, torn)


def crash_one(random: Random) -> Act:
    """One engine, any one, dies."""

    def act(sim: Simulation) -> None:
        replicas = sorted(
            (node_id, replica_id)
            for node_id, node in sim.nodes.items()
            if node.up
            for replica_id in node.replicas()
        )
        if replicas:
            node_id, replica_id = random.choice(replicas)
            sim.nodes[node_id].crash(replica_id)

    return act


def starts_fail(model: str, kind: str | None) -> Act:
    """From now on that model's starts end with this exit kind; None: they succeed again."""

    def act(sim: Simulation) -> None:
        for node in sim.nodes.values():
            if kind is None:
                node.failing.pop(model, None)
            else:
                node.failing[model] = kind

    return act


def bad_canary(model: str) -> Act:
    """The model's next wake fails, on every node."""

    def act(sim: Simulation) -> None:
        for node in sim.nodes.values():
            node.bad_canary.add(model)

    return act


def device_fault(node_id: str, index: int, reason: str | None) -> Act:
    """A device of the node shows an error; None: it is well again."""

    def act(sim: Simulation) -> None:
        node = sim.nodes[node_id]
        if node.up:
            node.fault(node.devices[index], reason)

    return act


def preempt(node_id: str, grace_s: float) -> Act:
    """The node is told to go within `grace_s`, and goes then, unless that was called off."""

    def act(sim: Simulation) -> None:
        node = sim.nodes[node_id]
        if node.up:
            goes_at = node.preempted_at = sim.loop.now + grace_s
            sim.loop.after(grace_s, go, sim, goes_at)

    def go(sim: Simulation, goes_at: float) -> None:
        if sim.nodes[node_id].preempted_at == goes_at:
            sim.lose_node(node_id)

    return act


def unload(model: str) -> Act:
    """An operator stops all of its replicas."""
    return lambda sim: sim.control.unload(model)


def load(model: str, replicas: int = 1) -> Act:
    """An operator asks for it."""
    return lambda sim: sim.control.load(model, replicas)


def cordon(node_id: str, cordoned: bool, drain: bool = False) -> Act:
    """An operator cordons, drains or uncordons it."""
    return lambda sim: sim.control.cordon(node_id, cordoned, drain)


def pin(model: str, pinned: bool) -> Act:
    """An operator pins or unpins it."""
    return lambda sim: sim.control.pin(model, pinned)
