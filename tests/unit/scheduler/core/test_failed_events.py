"""An event that one part of the core fails on: what the others decided of it is handed out."""

from __future__ import annotations

import pytest

from runtime.wire.agent_messages import StartReplica
from runtime.wire.routes import RouteRule, RouteTarget
from scheduler.core import publisher
from scheduler.core.turn import EventFailed
from scheduler.state import messages as m
from scheduler.state.cluster import Stage
from tests.kits.scheduler_world import World, one_gpu, spec


@pytest.fixture
def world() -> World:
    """One node, and a model that nobody calls."""
    world = World(one_gpu())
    world.put(spec("a"))
    world.run(1)
    return world


def break_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the core fail where it works out a route, after all decisions."""

    def fail(*_: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(publisher, "model_route", fail)


def failed(world: World, event: m.Event) -> list[m.Command]:
    """What was decided of an event that the core fails on."""
    with pytest.raises(EventFailed) as failure:
        world.core.handle(event)
    name = type(event).__name__
    assert str(failure.value) == f"the core failed on {name}: KeyError('a fault of ours')"
    return failure.value.commands


def load(world: World) -> m.LoadAsked:
    return m.LoadAsked(now=world.now, model="a", replicas=1)


def test_a_start_that_the_state_has_is_sent(world: World, monkeypatch) -> None:
    break_routes(monkeypatch)
    commands = failed(world, load(world))
    (replica,) = world.core.state.replicas.values()
    assert replica.stage is Stage.SENT
    starts = [c.command for c in commands if isinstance(c, m.Send)]
    assert [type(start) for start in starts] == [StartReplica]
    assert [c.action for c in commands if isinstance(c, m.Decided)] == ["start"]


def test_a_device_that_the_state_has_quarantined_is_stored(world: World, monkeypatch) -> None:
    world.apply(load(world))
    world.run(4)
    break_routes(monkeypatch)
    quarantine = m.QuarantineSet(now=world.now, node_id="n1", device_id="g0", reason="noisy")
    commands = failed(world, quarantine)
    assert world.core.state.nodes["n1"].quarantine == {"g0": "noisy"}
    assert m.Quarantined(node_id="n1", device_id="g0", reason="noisy") in commands


def test_nothing_decided_is_handed_out_twice(world: World, monkeypatch) -> None:
    break_routes(monkeypatch)
    first = failed(world, load(world))
    assert first
    assert failed(world, m.FloorSet(now=world.now, model="a", floor=None)) == []


def test_rules_that_a_failure_kept_back_are_published_after_it(world: World, monkeypatch) -> None:
    rules = (RouteRule(name="chat", targets=(RouteTarget(model="a"),)),)
    break_routes(monkeypatch)
    failed(world, m.FloorSet(now=world.now, model="a", floor=None))  # changes no route
    assert failed(world, m.RulesSet(now=world.now, rules=rules)) == []
    monkeypatch.undo()
    world.apply(m.Tick(now=world.now))
    assert world.table is not None
    assert world.table.rules == rules
