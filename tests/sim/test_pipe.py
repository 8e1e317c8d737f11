"""Virtual time and shared bandwidth, by worked examples."""

from __future__ import annotations

from random import Random

import pytest

from runtime.sim.loop import Loop
from runtime.sim.pipe import Pipe
from scheduler.sim.network import DELAY_S, FAIR, LOST_S, Network, Weather


def test_entries_run_by_time_and_then_in_the_order_they_were_made() -> None:
    loop = Loop()
    ran: list[str] = []
    loop.at(2.0, ran.append, "c")
    loop.at(1.0, ran.append, "a")
    loop.at(1.0, ran.append, "b")
    loop.at(3.5, ran.append, "late")
    loop.run(3.0)
    assert (ran, loop.now, loop.events) == (["a", "b", "c"], 3.0, 3)


def test_what_is_due_in_the_past_runs_now() -> None:
    loop = Loop()
    ran: list[float] = []
    loop.run(5.0)
    loop.at(1.0, lambda: ran.append(loop.now))
    loop.run(6.0)
    assert ran == [5.0]


def test_two_transfers_share_the_rate() -> None:
    """The worked example of runtime/sim/pipe.py: both end at 3 s."""
    loop = Loop()
    pipe = Pipe(loop, 1e9)
    ended: dict[str, float] = {}
    loop.at(0.0, lambda: pipe.send(2e9, lambda: ended.setdefault("a", loop.now)))
    loop.at(1.0, lambda: pipe.send(1e9, lambda: ended.setdefault("b", loop.now)))
    loop.run(10.0)
    assert ended == pytest.approx({"a": 3.0, "b": 3.0})


def test_a_cancelled_transfer_gives_its_share_back() -> None:
    loop = Loop()
    pipe = Pipe(loop, 1e9)
    ended: dict[str, float] = {}
    first = pipe.send(4e9, lambda: ended.setdefault("a", loop.now))
    pipe.send(2e9, lambda: ended.setdefault("b", loop.now))
    loop.at(2.0, lambda: pipe.cancel(first))  # by then each has got 1 GB
    loop.run(10.0)
    assert ended == pytest.approx({"b": 3.0})


def test_a_disk_that_slows_down_slows_what_is_under_way() -> None:
    loop = Loop()
    pipe, ended = Pipe(loop, 1e9), []
    pipe.send(2e9, lambda: ended.append(loop.now))
    loop.at(1.0, lambda: pipe.set_rate(0.1e9))
    loop.run(20.0)
    assert ended == pytest.approx([11.0])


def _sent(weather: Weather, count: int = 2000) -> tuple[list[float], list[float]]:
    loop = Loop()
    network = Network(loop, Random(1).random)
    network.weather = weather
    arrived: list[float] = []
    lost: list[float] = []
    for _ in range(count):
        network.send(lambda: lost.append(loop.now), lambda: arrived.append(loop.now))
    loop.run(100.0)
    return arrived, lost


def test_in_fair_weather_every_message_arrives_once() -> None:
    arrived, lost = _sent(FAIR)
    assert (set(arrived), len(arrived), lost) == ({DELAY_S}, 2000, [])


def test_lost_messages_are_told_to_their_sender_and_doubled_ones_arrive_twice() -> None:
    arrived, lost = _sent(Weather(lost=0.25))
    assert len(arrived) + len(lost) == 2000
    assert len(lost) == pytest.approx(500, abs=80)
    assert set(lost) == {LOST_S}
    assert len(_sent(Weather(doubled=0.5))[0]) == pytest.approx(3000, abs=100)


def test_late_messages_are_overtaken() -> None:
    arrived, _ = _sent(Weather(late=0.5, late_s=2.0))
    assert max(arrived) > 1.5
    assert sum(1 for at in arrived if at > 0.01) == pytest.approx(1000, abs=100)
