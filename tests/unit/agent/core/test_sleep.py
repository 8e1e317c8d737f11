"""The agent's core: sleep and wake, and sleepers that are adopted, crash or hang."""

from __future__ import annotations

import msgspec
import pytest

from agent.core import state_machine
from agent.core.messages import (
    CommandRefused,
    ForgetRecord,
    PhasesSeen,
    SaveDisabled,
    SendHeartbeatNow,
    ShutdownRequested,
    Signal,
    SleepEngine,
    Spawn,
    StatusSeen,
    WakeEngine,
)
from tests.kits.agent_core_harness import (
    SPEC,
    Harness,
    adopt,
    of,
    saved_of,
    sleep,
    start,
    stop,
    wake,
)


@pytest.fixture
def h() -> Harness:
    return Harness()


# ------------------------------------------------------------------------------ sleep and wake


def test_a_sleep_waits_for_what_is_in_flight_then_sleeps(h):
    h.ready()
    h.status(2)
    effects = h.command(sleep(level=2))
    assert not of(effects, SleepEngine)
    assert (h.phase(), h.report().reason) == ("draining", "idle")
    assert not of(h.status(1), SleepEngine)
    assert of(h.status(0), SleepEngine) == [SleepEngine("a", 2)]
    assert (h.phase(), h.report().sleep_level) == ("sleeping", 2)
    h.now += 3.0
    effects = h.slept(residue_bytes=7)
    assert SendHeartbeatNow() in effects
    report = h.report()
    assert (report.phase, report.sleep_level, report.residue_bytes) == ("asleep", 2, 7)
    assert (report.sleep_s, report.phase_age_s) == (3.0, 0.0)


def test_a_sleep_counts_what_is_in_flight_again(h):
    h.ready()
    h.status(0)
    asked_at = h.now
    h.now += 1.0
    h.command(sleep())
    stale = h(StatusSeen, replica_id="a", in_flight=0, idle_for_s=None, asked_at=asked_at)
    assert not of(stale, SleepEngine)
    h.tick(30.0)
    assert h.phase() == "draining"
    fresh = h(StatusSeen, replica_id="a", in_flight=0, idle_for_s=None, asked_at=h.now)
    assert of(fresh, SleepEngine)


def test_a_sleep_that_finds_no_end_of_the_requests_serves_on(h):
    h.ready()
    h.command(sleep(grace_s=20.0))
    h.status(3)
    assert not of(h.tick(19.0), Signal)
    assert h.phase() == "draining"
    effects = h.tick(1.0)
    assert not of(effects, Signal)
    report = h.report()
    assert (report.phase, report.sleep_level, report.in_flight) == ("ready", 0, 3)
    assert "3 requests" in report.reason
    assert "20 s" in report.reason
    h.command(sleep())
    assert of(h.status(0), SleepEngine)


def test_a_sleep_without_patience_still_asks_once(h):
    h.ready()
    h.command(sleep(grace_s=0.0))
    h.tick()
    assert h.phase() == "draining"
    assert of(h.status(0), SleepEngine)
    h.ready("b", devices=("d1",))
    h.command(sleep("b", grace_s=0.0))
    h.status(1, "b")
    assert h.phase("b") == "ready"


def test_a_sleep_of_an_engine_that_tells_nothing_serves_on(h):
    h.ready()
    h.command(sleep(grace_s=10.0))
    h.tick(10.0)
    assert h.phase() == "draining"
    h.tick(state_machine.STATUS_S)
    assert h.phase() == "ready"
    assert "in flight" in h.report().reason


def test_a_wake_takes_its_time_and_is_ready_with_its_canary(h):
    h.asleep(level=2)
    h.tick(500.0)
    assert h.phase() == "asleep"
    assert of(h.command(wake()), WakeEngine) == [WakeEngine("a", 2)]
    assert (h.phase(), h.report().reason) == ("waking", "demand")
    h.status(0)
    h.healthy()
    assert h.phase() == "waking"
    h.now += 2.0
    h.woken(phases={"wake": 1.5, "canary": 0.5})
    report = h.report()
    assert (report.phase, report.wake_s, report.reason) == ("ready", 2.0, None)
    assert report.phases == {"wake": 1.5, "canary": 0.5}
    assert (report.sleep_level, report.residue_bytes) == (0, 0)


def test_repeating_a_sleep_or_a_wake_changes_nothing(h):
    h.ready()
    assert h.command(wake()) == []
    h.command(sleep(level=1))
    assert h.command(sleep(level=2)) == []
    h.status(0)
    assert h.command(sleep(level=2)) == []
    h.slept()
    assert h.command(sleep(level=2)) == []
    assert h.report().sleep_level == 1
    h.command(wake())
    assert h.command(wake()) == []
    h.woken()
    assert h.phase() == "ready"


def test_a_wake_that_comes_before_the_memory_is_touched_cancels_the_sleep(h):
    h.ready()
    h.status(1)
    h.command(sleep())
    assert not of(h.command(wake()), CommandRefused)
    report = h.report()
    assert (report.phase, report.in_flight, report.reason) == ("ready", 1, None)
    assert not of(h.status(0), SleepEngine)
    h.command(start("b"))  # it has the device now
    h.command(sleep())
    assert not of(h.status(0), SleepEngine)
    assert h.phase() == "sleeping"
    h.command(wake())
    assert h.phase() == "ready"


def test_a_wake_while_it_falls_asleep_is_done_right_after(h):
    h.ready()
    h.command(sleep())
    h.status(0)
    assert not of(h.command(wake()), WakeEngine)
    assert h.phase() == "sleeping"
    assert of(h.slept(), WakeEngine) == [WakeEngine("a", 1)]
    assert h.phase() == "waking"


def test_a_sleep_after_that_wake_is_the_last_word(h):
    h.ready()
    h.command(sleep())
    h.status(0)
    h.command(wake())
    h.command(sleep())
    assert not of(h.slept(), WakeEngine)
    assert h.phase() == "asleep"


def test_what_cannot_sleep_is_refused_with_words_and_serves_on():
    h = Harness(rungs=(1,))
    h.ready()
    (refused,) = h.command(sleep(level=2))
    assert "no sleep level 2" in refused.error
    assert "1" in refused.error
    h.ready("b", devices=("d1",), spec=msgspec.structs.replace(SPEC, sleep="off"))
    (refused,) = of(h.command(sleep("b")), CommandRefused)
    assert "sleep: off" in refused.error
    h.command(start("c", devices=("d2",)))
    (refused,) = of(h.command(sleep("c")), CommandRefused)
    assert "starting" in refused.error
    assert [h.phase(x) for x in "abc"] == ["ready", "ready", "starting"]
    assert (h.report("a").rungs, h.report("b").rungs) == ((1,), ())


@pytest.mark.parametrize("command", [sleep("x"), wake("x")])
def test_an_unknown_replica_neither_sleeps_nor_wakes(h, command):
    (refused,) = of(h.command(command), CommandRefused)
    assert not refused.stale
    assert "x is not on this node" in refused.error


def test_one_that_stops_or_failed_neither_sleeps_nor_wakes(h):
    h.ready()
    h.status(1)
    h.command(stop())
    h.ready("b", devices=("d1",))
    h.exited("b", kind="bad_model")
    for replica_id in "ab":
        for command in (sleep(replica_id), wake(replica_id)):
            assert of(h.command(command), CommandRefused), command
    assert [h.phase(x) for x in "ab"] == ["draining", "failed"]


def test_a_start_that_must_be_alone_waits_for_what_moves_memory_there(h):
    h.asleep("a")
    h.ready("b")
    h.command(sleep("b"))
    assert of(h.status(0, "b"), SleepEngine)
    assert of(h.command(wake("a")), WakeEngine) == [WakeEngine("a", 1)]
    h.now += 1.0
    assert not of(h.command(start("c")), Spawn)
    assert (h.phase("a"), h.phase("c")) == ("waking", "starting")
    assert of(h.command(start("e", devices=("d1",))), Spawn)
    h.now += 1.0
    assert not of(h.slept("b"), Spawn)
    effects = h.woken("a")
    assert of(effects, Spawn) == [Spawn("c")]
    assert h.report("a").wake_s == 2.0


def test_nothing_begins_beside_a_start_that_must_be_alone(h):
    h.asleep("a")
    assert of(h.command(start("c")), Spawn)
    assert not of(h.command(wake("a")), WakeEngine)
    assert not of(h.command(start("d", alone=False)), Spawn)
    h.now += 1.0
    effects = h.healthy("c")
    assert (of(effects, WakeEngine), of(effects, Spawn)) == ([WakeEngine("a", 1)], [Spawn("d")])
    h.now += 1.0
    h.woken("a")
    assert h.report("a").wake_s == 1.0  # without the time it waited


def test_one_that_must_be_alone_is_not_overtaken(h):
    assert of(h.command(start("a", alone=False)), Spawn)
    assert of(h.command(start("b", alone=False)), Spawn)
    assert not of(h.command(start("c")), Spawn)
    assert not of(h.command(start("d", alone=False)), Spawn)
    h.healthy("a")
    assert of(h.healthy("b"), Spawn) == [Spawn("c")]
    assert of(h.healthy("c"), Spawn) == [Spawn("d")]


def test_waiting_for_a_device_is_no_part_of_a_sleeps_time(h):
    h.ready("a")
    h.command(start("b"))
    h.command(sleep("a"))
    h.status(0, "a")
    h.tick(90.0)
    assert h.phase("a") == "sleeping"
    h.healthy("b")
    assert not of(h.tick(state_machine.SLEEP_S), Signal)
    assert Signal("a", "KILL") in h.tick(1.0)


@pytest.mark.parametrize("how", ["told", "too long", "died"])
@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_a_rung_that_fails_costs_a_restart_and_is_not_used_again(h, what, how):
    if what == "wake":
        h.asleep()
        h.command(wake())
    else:
        h.ready()
        h.command(sleep())
        h.status(0)
    if how == "told":
        effects = (h.slept if what == "sleep" else h.woken)(error="it came back wrong")
    elif how == "died":
        effects = h.exited(words="no memory")
    else:
        assert not of(
            h.tick(state_machine.SLEEP_S if what == "sleep" else state_machine.WAKE_S), Signal
        )
        effects = h.tick(0.5)
    assert Signal("a", "KILL") in effects
    assert SaveDisabled() in effects
    report = h.report()
    assert (report.phase, report.sleep_level, report.rungs) == ("backoff", 0, (2,))
    assert list(report.disabled) == ["asleep-1"]
    expected = {"told": "came back wrong", "died": "no memory", "too long": "more than"}[how]
    assert expected in report.disabled["asleep-1"]
    assert of(h.gone(), Spawn)
    h.healthy()
    (refused,) = of(h.command(sleep(level=1)), CommandRefused)
    assert report.disabled["asleep-1"] in refused.error
    assert not of(h.command(sleep(level=2)), CommandRefused)
    successor = Harness(disabled=h.core.disabled)
    successor.ready("z")
    assert successor.report("z").disabled == report.disabled
    assert of(successor.command(sleep("z")), CommandRefused)
    successor.ready("y", devices=("d1",), spec=msgspec.structs.replace(SPEC, source="elsewhere"))
    assert successor.report("y").disabled == {}


def test_a_sleep_that_did_not_touch_the_engine_costs_nothing(h):
    h.ready()
    h.command(sleep())
    h.status(0)
    effects = h.slept(error="2 requests came in", untouched=True)
    assert not of(effects, Signal)
    report = h.report()
    assert (report.phase, report.disabled) == ("ready", {})
    assert "2 requests came in" in report.reason


def test_what_is_told_of_an_earlier_sleep_changes_nothing(h):
    h.ready()
    assert h.slept() == []
    assert h.woken(error="late") == []
    h.asleep("b", devices=("d1",))
    assert h.slept("b", error="late") == []
    assert (h.phase("a"), h.phase("b")) == ("ready", "asleep")


@pytest.mark.parametrize("phase", ["drains to sleep", "sleeping", "asleep", "waking"])
def test_stop_ends_it_in_every_phase(h, phase):
    h.ready()
    h.status(1)
    h.command(sleep())
    if phase != "drains to sleep":
        h.status(0)
    if phase in ("asleep", "waking"):
        h.slept()
    if phase == "waking":
        h.command(wake())
    effects = h.command(stop())
    if phase == "drains to sleep":
        assert not of(effects, Signal)
        assert of(h.status(0), Signal) == [Signal("a", "TERM")]
    else:
        assert Signal("a", "KILL") in effects
    assert h.phase() == "stopping"
    assert ForgetRecord("a") in h.gone()


def test_a_shutdown_ends_sleepers(h):
    h.asleep()
    assert Signal("a", "KILL") in h(ShutdownRequested, grace_s=30.0)
    h.gone()
    assert h.core.finished


def test_a_sleeper_that_dies_or_hangs_is_left_to_the_scheduler(h):
    h.asleep()
    h.tick(500.0)
    h.exited()
    assert h.phase() == "failed"  # its device memory may be another's by now
    assert h.report().disabled == {}
    assert not of(h.gone(), Spawn)
    h.asleep("b", devices=("d1",))
    h.healthy("b", healthy=False)
    assert Signal("b", "KILL") in h.tick(state_machine.HUNG_S)
    assert h.report("b").exit_kind == "hung"


def test_an_engine_that_dies_while_it_drains_to_sleep_is_restarted(h):
    h.ready()
    h.status(1)
    h.command(sleep())
    h.exited(kind="oom")
    assert (h.phase(), h.report().exit_kind) == ("backoff", "oom")
    assert of(h.gone(), Spawn)


def test_naps_do_not_make_old_crashes_count_again(h):
    h.ready()
    for _ in range(10):
        h.tick(61.0)
        h.command(sleep())
        h.status(0)
        h.slept()
        h.command(wake())
        h.woken()
        h.exited()
        assert of(h.gone(), Spawn)
        h.healthy()


def test_the_phases_of_a_start_are_told(h):
    h.ready()
    effects = h(PhasesSeen, replica_id="a", phases={"weights": 1.0})
    assert SendHeartbeatNow() in effects
    assert h.report().phases == {"weights": 1.0}
    h.exited()
    h.gone()
    assert h.report().phases == {}


def test_idle_time_goes_on_while_asleep(h):
    h.ready()
    h.status(0, idle_for_s=3.0)
    h.command(sleep())
    h.status(0, idle_for_s=3.0)
    h.slept()
    h.now += 10.0
    assert h.report().idle_for_s == 13.0


def test_a_sleeper_is_adopted_asleep(h):
    h.asleep(level=2)
    successor, effects = adopt(saved_of(h), alive=True, healthy=True, sleeping=True)
    assert not of(effects, Signal)
    report = successor.report()
    assert (report.phase, report.sleep_level, report.residue_bytes) == ("asleep", 2, 7)
    assert report.rungs == (1, 2)
    assert of(successor.command(wake()), WakeEngine) == [WakeEngine("a", 2)]


@pytest.mark.parametrize("phase", ["sleeping", "asleep", "waking"])
@pytest.mark.parametrize("sleeping", [True, False, None])
def test_half_way_the_engine_itself_says_what_it_is(h, phase, sleeping):
    h.ready()
    h.command(sleep())
    h.status(0)
    if phase != "sleeping":
        h.slept(residue_bytes=7)
    if phase == "waking":
        h.command(wake())
    successor, effects = adopt(
        saved_of(h), alive=True, healthy=True, sleeping=sleeping, residue_bytes=9
    )
    if sleeping is False:
        assert of(effects, WakeEngine) == [WakeEngine("a", 1)]
        assert successor.phase() == "waking"
        successor.woken()
        assert successor.phase() == "ready"
    else:
        assert successor.phase() == "asleep"
        assert successor.report().residue_bytes == (9 if phase == "sleeping" else 7)


def test_one_that_drained_to_sleep_is_adopted_ready(h):
    h.ready()
    h.status(1)
    h.command(sleep())
    successor, effects = adopt(saved_of(h), alive=True, healthy=True)
    assert not of(effects, Signal)
    assert (successor.phase(), successor.report().sleep_level) == ("ready", 0)


def test_a_sleeper_that_died_unseen_is_left_to_the_scheduler(h):
    h.asleep()
    successor, effects = adopt(saved_of(h), alive=False)
    assert Signal("a", "KILL") in effects
    assert not of(successor.gone(), Spawn)
    assert successor.phase() == "failed"


def test_a_sleeper_that_does_not_answer_after_an_adoption_is_hung(h):
    h.asleep()
    successor, _ = adopt(saved_of(h), alive=True, healthy=False)
    assert successor.phase() == "asleep"
    assert Signal("a", "KILL") in successor.tick(state_machine.HUNG_S)
