"""The rules can fail: each is broken on purpose, and has to be noticed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from cli.simulation import make_node
from runtime.wire.agent_messages import SleepReplica, StartReplica, StopReplica
from scheduler.core.decisions import Core
from scheduler.sim import faults as f
from scheduler.sim.policy import Policy
from scheduler.sim.rule_checker import Violation
from scheduler.sim.simulator import Fault, Simulation
from scheduler.state import messages as m
from tests.kits.scenarios import GIB, Arrival, NodePlan, scenario, sized


class Rewriting:
    """The production core, with some of its commands changed on the way out."""

    def __init__(self) -> None:
        self.core = Core()

    def handle(self, event: m.Event) -> Sequence[m.Command]:
        return [self.change(command, event.now) for command in self.core.handle(event)]

    def change(self, command: m.Command, now: float) -> m.Command:
        return command


def run(policy: type[Policy], calls: Sequence[Arrival], **fields: object) -> None:
    models = [sized(name, 8, device_memory_bytes=50 * GIB, idle_s=15.0) for name in "ab"]
    Simulation(scenario(models, calls, **fields), make_node, policy).run()


def test_a_start_into_memory_that_is_not_free_is_noticed() -> None:
    class Crowding(Rewriting):
        def change(self, command: m.Command, now: float) -> m.Command:
            match command:
                case m.Send(command=StartReplica() as start):
                    there = replace(start, device_ids=("n0-gpu0",))
                    return m.Send(node_id="n0", command=there)
            return command

    nodes = [NodePlan("n0", devices=2)]
    calls = [Arrival(0.0, "a", 10, 1), Arrival(0.0, "b", 10, 1)]
    with pytest.raises(Violation, match="really holds"):
        run(Crowding, calls, nodes=nodes)


def test_an_eviction_that_ends_a_request_is_noticed() -> None:
    class Cutting(Rewriting):
        """Its sleeps are stops without grace, and what it says of them is that they evict."""

        asked = False

        def handle(self, event: m.Event) -> Sequence[m.Command]:
            out = list(super().handle(event))
            replica = next(iter(self.core.state.replicas.values()), None)
            if event.now > 60 and not self.asked and replica is not None:
                self.asked = True
                stop = StopReplica(
                    replica_id=replica.replica_id, epoch=1, grace_s=0.0, reason="", cause=""
                )
                said = m.Decided(
                    number=1, at=event.now, action="evict", model="a", reason="for b",
                    replica_id=replica.replica_id, node_id="n0",
                )  # fmt: skip
                out += [said, m.Send(node_id="n0", command=stop)]
            return out

    with pytest.raises(Violation, match="in flight"):
        run(Cutting, [Arrival(0.0, "a", 10, 5000)])


def test_an_eviction_before_the_dwell_time_is_noticed() -> None:
    class Thrashing(Rewriting):
        asked = False

        def handle(self, event: m.Event) -> Sequence[m.Command]:
            out = list(super().handle(event))
            ready = [r for r in self.core.state.replicas.values() if r.stage == "ready"]
            if ready and not self.asked:
                self.asked = True
                out.append(
                    m.Decided(
                        number=1, at=event.now, action="evict", model="a", reason="for b",
                        replica_id=ready[0].replica_id, node_id="n0",
                    )
                )  # fmt: skip
            return out

    with pytest.raises(Violation, match="dwell"):
        run(Thrashing, [Arrival(0.0, "a", 10, 1)])


def test_a_policy_that_forgets_its_callers_is_noticed() -> None:
    class Idle:
        def handle(self, event: m.Event) -> Sequence[m.Command]:
            kept = Core()
            if isinstance(event, m.Elected):
                return [m.Publish(table=_table(kept, event))]
            return []

    models = [sized("a", 8, hold_s=3000.0)]
    simulation = Simulation(scenario(models, [Arrival(0.0, "a", 10, 1)]), make_node, Idle)
    with pytest.raises(Violation, match="have not ended"):
        simulation.run()


def _table(core: Core, event: m.Elected):
    from runtime.wire.routes import ModelRoute, RouteTable

    routes = tuple(ModelRoute(name=s.spec.name, hold_s=s.spec.hold_s) for s in event.models)
    return RouteTable(version=1, models=routes)


def test_the_schedulers_own_rules_are_checked_after_each_event() -> None:
    class Booking(Rewriting):
        def __init__(self) -> None:
            super().__init__()
            self.state = self.core.state

        def handle(self, event: m.Event) -> Sequence[m.Command]:
            out = super().handle(event)
            self.state = self.core.state
            for replica in self.state.replicas.values():
                self.state.nodes[replica.node_id].replicas.pop(replica.replica_id, None)
            return out

    with pytest.raises(Violation, match="after"):
        run(Booking, [Arrival(0.0, "a", 10, 1)])


def test_an_old_leader_is_fenced_off() -> None:
    """Two leaders decide for 30 s; once an agent heard the later one, it obeys no other."""
    calls = [Arrival(2.0 * i, name, 10, 1) for i in range(40) for name in "ab"]
    models = [sized(name, 8, device_memory_bytes=50 * GIB, idle_s=5.0) for name in "ab"]
    faults = [Fault(20.0, "fail over", f.fail_over(30.0, ("n0",)))]
    simulation = Simulation(scenario(models, calls, faults=faults), make_node)
    late: list[object] = []
    node = simulation.nodes["n0"]
    obey = node.command

    def watched(command: StartReplica | StopReplica | SleepReplica) -> object:
        reply = obey(command)
        if command.epoch < node.core.epoch:  # type: ignore[attr-defined]
            late.append(reply)
        return reply

    node.command = watched  # type: ignore[assignment,method-assign]
    report = simulation.run()
    assert report.outcomes == {"answered": 80}
    assert set(late) == {None}


def test_a_core_that_obeys_an_older_leader_is_noticed() -> None:
    """The world's own memory of epochs, for the case that an agent's fence fails."""
    simulation = Simulation(scenario([sized("a", 8)], []), make_node)
    node = simulation.nodes["n0"]
    stop = StopReplica(replica_id="x", epoch=2, grace_s=0.0, reason="")
    assert node.command(stop) is not None
    node.core.epoch = 0  # type: ignore[attr-defined]  # its fence forgets
    with pytest.raises(Violation, match="obeyed epoch 1 after 2"):
        node.command(replace(stop, epoch=1))
