"""Floors: by schedule, by wish and by spec; and what the scheduler does to keep them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from runtime.contract.prewarm import Ask, floor_at
from runtime.contract.schema import SchemaError
from runtime.contract.spec_file import parse_specs
from runtime.wire.model_spec import Prewarm, PrewarmWindow
from scheduler.state import messages as m
from scheduler.state.cluster import Stage
from tests.kits.scheduler_world import GIB, FakeNode, World, spec


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


DAILY = Prewarm(schedule=(PrewarmWindow(cron="0 8 * * *", for_s=3600),))


@pytest.mark.parametrize(
    ("when", "floor"),
    [
        ("2026-11-23T07:58:59", None),
        ("2026-11-23T07:59:00", "hot"),  # 60 s of lead
        ("2026-11-23T08:59:59", "hot"),
        ("2026-11-23T09:00:00", None),
    ],
)
def test_the_worked_example(when: str, floor: str | None) -> None:
    assert floor_at(DAILY, (), at(when), 60.0) == floor


def test_a_schedule_is_in_its_own_time_zone() -> None:
    berlin = PrewarmWindow(cron="0 8 * * 1-5", for_s=3600, timezone="Europe/Berlin")
    prewarm = Prewarm(schedule=(berlin,))
    assert floor_at(prewarm, (), at("2026-11-23T07:30:00"), 0.0) == "hot"  # a Monday in winter
    assert floor_at(prewarm, (), at("2026-07-06T06:30:00"), 0.0) == "hot"  # one in summer
    assert floor_at(prewarm, (), at("2026-11-22T07:30:00"), 0.0) is None  # a Sunday


def test_the_highest_rung_wins() -> None:
    base = Prewarm(min_warm="asleep")
    assert floor_at(base, (), 0.0, 0.0) == "asleep"
    ask = Ask(rung="hot", by=1000.0, for_s=60.0)
    assert floor_at(base, (ask,), 995.0, 10.0) == "hot"
    assert floor_at(base, (ask,), 1060.0, 10.0) == "asleep"


def test_bad_schedules_are_named() -> None:
    text = (
        "name: a\nsource: /m\nprewarm:\n  schedule:\n"
        "  - {cron: '0 25 * * *', for_s: 60}\n"
        "  - {cron: '0 8 * * *', for_s: 60, timezone: Europe/Atlantis}\n"
    )
    with pytest.raises(SchemaError) as caught:
        parse_specs(text)
    assert {p.field for p in caught.value.problems} == {
        "prewarm.schedule[0].cron",
        "prewarm.schedule[1].timezone",
    }


def world(**fields: object) -> World:
    values = {"rungs": (1, 2), "host_budget": 64 * GIB, **fields}
    return World(FakeNode("n1", {"g0": 24 * GIB}, **values))  # type: ignore[arg-type]


def set_floor(world: World, floor: str | None) -> None:
    world.apply(m.FloorSet(now=world.now, model="a", floor=floor))  # type: ignore[arg-type]


def test_a_hot_floor_starts_the_model_and_keeps_it() -> None:
    w = world()
    w.put(spec("a", 20, idle_s=5), spec("b", 20))
    set_floor(w, "hot")
    w.run(20)
    assert w.hot() == {"a"}
    w.want("b")
    w.run(10)
    assert w.hot() == {"a"}  # not evicted below its floor
    set_floor(w, None)
    w.run(10)
    assert w.hot() == {"b"}


def test_an_asleep_floor_starts_it_once_and_lets_it_sleep_for_good() -> None:
    w = world()
    w.put(spec("a", 20, idle_s=5, asleep_s=10))
    set_floor(w, "asleep")
    w.run(60)
    (replica,) = w.core.state.replicas.values()
    assert replica.stage is Stage.ASLEEP
    assert w.nodes["n1"].started == ["a-1-1"]
    set_floor(w, None)
    w.run(15)
    assert not w.core.state.replicas


def test_without_a_way_to_sleep_an_asleep_floor_keeps_it_hot() -> None:
    w = world(rungs=())
    w.put(spec("a", 20, idle_s=5))
    set_floor(w, "asleep")
    w.run(30)
    assert w.hot() == {"a"}
    assert w.nodes["n1"].started == ["a-1-1"]
