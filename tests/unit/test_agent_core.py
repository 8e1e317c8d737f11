"""The agent's core: every rule in its docstring, then random walks that keep its invariants."""

from __future__ import annotations

import typing

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent import core, messages
from agent.core import AgentCore
from agent.messages import (
    Adopted,
    CommandReceived,
    ForgetRecord,
    Gone,
    HealthChanged,
    PhasesSeen,
    ProcessExited,
    Refused,
    Saved,
    SaveDisabled,
    SaveEpoch,
    SendHeartbeatNow,
    ShutdownRequested,
    Signal,
    SleepEnded,
    SleepEngine,
    Spawn,
    StatusSeen,
    TermSeen,
    Tick,
    WakeEnded,
    WakeEngine,
)
from agent.replica import EDGES
from agent.transitions import backoff_s
from runtime.wire import (
    ModelSpec,
    ReplicaPhase,
    SleepReplica,
    StartReplica,
    StopReplica,
    WakeReplica,
)

SPEC = ModelSpec(name="m", source="x", engine="stub", device_memory_bytes=1)


def start(
    replica_id: str = "a",
    epoch: int = 1,
    devices: tuple[str, ...] = ("d0",),
    spec=SPEC,
):
    return StartReplica(
        replica_id=replica_id,
        epoch=epoch,
        spec=spec,
        device_ids=devices,
        device_bytes=1,
        reason="demand",
    )


def stop(replica_id: str = "a", epoch: int = 1, grace_s: float = 60.0):
    return StopReplica(replica_id=replica_id, epoch=epoch, grace_s=grace_s, reason="idle")


def sleep(replica_id: str = "a", epoch: int = 1, level=1, grace_s: float = 60.0):
    return SleepReplica(
        replica_id=replica_id, epoch=epoch, level=level, grace_s=grace_s, reason="idle"
    )


def wake(replica_id: str = "a", epoch: int = 1):
    return WakeReplica(replica_id=replica_id, epoch=epoch, reason="demand")


class Harness:
    """A core, a clock, and the shortest ways to say things to it."""

    def __init__(self, max_restarts: int = 3, rungs=(1, 2), disabled=None) -> None:
        self.core = AgentCore(
            start_timeout_s=100.0,
            max_restarts=max_restarts,
            rungs=lambda spec: rungs if spec.sleep == "auto" else (),
            disabled=disabled,
        )
        self.now = 1000.0

    def __call__(self, event, **fields):
        effects = self.core.handle(event(now=self.now, **fields))
        self.core.validate_state()
        return effects

    def command(self, command):
        return self(CommandReceived, command=command)

    def exited(self, replica_id="a", kind="crash", words="it crashed"):
        return self(ProcessExited, replica_id=replica_id, kind=kind, words=words)

    def healthy(self, replica_id="a", healthy=True):
        return self(HealthChanged, replica_id=replica_id, healthy=healthy)

    def status(self, in_flight, replica_id="a", idle_for_s=None):
        return self(StatusSeen, replica_id=replica_id, in_flight=in_flight, idle_for_s=idle_for_s)

    def gone(self, replica_id="a"):
        return self(Gone, replica_id=replica_id)

    def slept(self, replica_id="a", **fields):
        return self(SleepEnded, replica_id=replica_id, **fields)

    def woken(self, replica_id="a", **fields):
        return self(WakeEnded, replica_id=replica_id, **fields)

    def asleep(self, replica_id="a", level=1, **fields):
        self.ready(replica_id, **fields)
        self.command(sleep(replica_id, level=level))
        self.status(0, replica_id)
        self.slept(replica_id, residue_bytes=7)
        assert self.phase(replica_id) == "asleep"

    def tick(self, after_s=0.0):
        self.now += after_s
        return self(Tick)

    def ready(self, replica_id="a", **fields):
        self.command(start(replica_id, **fields))
        return self.healthy(replica_id)

    def report(self, replica_id="a"):
        return {r.replica_id: r for r in self.core.reports(self.now)}[replica_id]

    def phase(self, replica_id="a"):
        replica = self.core.replicas.get(replica_id)
        return replica.phase if replica else None


@pytest.fixture
def h() -> Harness:
    return Harness()


def of(effects, kind):
    return [e for e in effects if isinstance(e, kind)]


# ------------------------------------------------------------------------------ start


def test_start_spawns_and_is_ready_with_its_health(h):
    effects = h.command(start())
    assert of(effects, Spawn) == [Spawn("a")]
    assert SendHeartbeatNow() in effects
    assert h.phase() == "starting"
    h.now += 7.0
    effects = h.healthy()
    assert SendHeartbeatNow() in effects
    report = h.report()
    assert (report.phase, report.start_s, report.phase_age_s) == ("ready", 7.0, 0.0)
    assert report.launch_key == SPEC.launch_key()


def test_repeating_a_start_changes_nothing(h):
    h.ready()
    before = h.report()
    assert h.command(start()) == []
    assert h.command(start(epoch=2)) == [SaveEpoch(2)]
    assert h.report() == before


def test_an_older_epoch_is_refused_for_starts_and_stops(h):
    h(TermSeen, term=5)
    for command in (start(epoch=4), stop(epoch=4)):
        (refused,) = h.command(command)
        assert refused.stale
        assert "epoch 4" in refused.error
        assert "5" in refused.error
    assert h.core.replicas == {}


def test_a_start_of_an_id_that_stops_or_was_stopped_is_refused(h):
    h.ready()
    h.command(stop())
    (refused,) = of(h.command(start()), Refused)
    assert not refused.stale
    assert "draining" in refused.error
    h.status(0)
    h.gone()
    (refused,) = of(h.command(start()), Refused)
    assert "was stopped" in refused.error


def test_a_stop_that_overtook_its_start_wins(h):
    assert h.command(stop()) == [SaveEpoch(1)]
    assert of(h.command(start()), Refused)
    assert h.phase() is None


@pytest.mark.parametrize("replica_id", ["../x", "", "a/b", "a b", "x" * 201])
def test_an_id_that_is_no_file_name_is_refused(h, replica_id):
    assert of(h.command(start(replica_id)), Refused)
    assert h.core.replicas == {}


def test_one_start_at_a_time_on_each_device(h):
    assert of(h.command(start("a", devices=("d0",))), Spawn)
    assert not of(h.command(start("b", devices=("d0", "d1"))), Spawn)
    assert h.phase("b") == "starting"
    # c would fit on d1 now, but b came first
    assert not of(h.command(start("c", devices=("d1",))), Spawn)
    assert of(h.command(start("e", devices=("d2",))), Spawn) == [Spawn("e")]
    assert of(h.healthy("a"), Spawn) == [Spawn("b")]
    # b fails: its memory is not gone yet, but it is not in phase starting any more
    assert of(h.exited("b", "bad_model"), Spawn) == [Spawn("c")]


def test_waiting_for_a_device_does_not_count_as_starting_time(h):
    h.command(start("a"))
    h.command(start("b"))
    h.tick(90.0)
    h.healthy("a")
    h.tick(90.0)
    assert h.phase("b") == "starting"
    h.tick(11.0)
    assert h.phase("b") == "failed"


def test_a_start_that_takes_too_long_fails_with_words(h):
    h.command(start())
    effects = h.tick(100.5)
    assert Signal("a", "KILL") in effects
    report = h.report()
    assert (report.phase, report.exit_kind) == ("failed", "start_timeout")
    assert "100 s" in report.reason


# ------------------------------------------------------------------------------ stop


def test_stop_during_starting_kills_at_once_and_waits_until_gone(h):
    h.command(start())
    assert Signal("a", "KILL") in h.command(stop())
    assert h.phase() == "stopping"
    h.exited()
    assert h.phase() == "stopping"
    assert ForgetRecord("a") in h.gone()
    assert h.phase() is None


def test_stop_of_a_start_that_waits_forgets_it(h):
    h.command(start("a"))
    h.command(start("b"))
    assert ForgetRecord("b") in h.command(stop("b"))
    assert not of(h.healthy("a"), Spawn)


def test_draining_waits_for_what_is_in_flight(h):
    h.ready()
    h.status(2)
    assert not of(h.command(stop()), Signal)
    assert h.phase() == "draining"
    assert h.report().in_flight == 2
    assert not of(h.status(1), Signal)
    assert of(h.status(0), Signal) == [Signal("a", "TERM")]
    assert h.phase() == "stopping"
    assert h.report().reason == "idle"


def test_draining_looks_anew_even_where_nothing_was_in_flight(h):
    h.ready()
    h.status(0)
    assert not of(h.command(stop()), Signal)
    assert of(h.status(0), Signal) == [Signal("a", "TERM")]


def test_draining_ends_with_its_grace_then_term_then_kill(h):
    h.ready()
    h.status(3)
    h.command(stop(grace_s=20.0))
    assert not of(h.tick(19.0), Signal)
    assert of(h.tick(1.0), Signal) == [Signal("a", "TERM")]
    assert not of(h.tick(9.0), Signal)
    assert of(h.tick(1.0), Signal) == [Signal("a", "KILL")]
    assert not of(h.tick(60.0), Signal)
    assert h.phase() == "stopping"
    assert ForgetRecord("a") in h.gone()


def test_a_second_stop_may_shorten_the_grace_but_not_lengthen_it(h):
    h.ready()
    h.command(stop(grace_s=20.0))
    h.command(stop(grace_s=500.0))
    h.command(stop(grace_s=5.0))
    assert of(h.tick(5.0), Signal) == [Signal("a", "TERM")]


def test_what_a_terminated_engine_leaves_behind_is_killed(h):
    h.ready()
    h.command(stop(grace_s=0.0))
    assert Signal("a", "KILL") in h.exited(kind="exited")


def test_an_engine_that_dies_while_draining_is_not_restarted_and_says_so(h):
    h.ready()
    h.status(2)
    h.command(stop())
    h.exited(kind="oom", words="no memory")
    assert h.phase() == "stopping"
    assert "2 requests" in h.report().reason
    assert "no memory" in h.report().reason


def test_stop_of_a_failed_replica_forgets_it_once_its_tree_is_gone(h):
    h.command(start())
    h.exited(kind="bad_model")
    h.command(stop())
    assert h.phase() == "stopping"
    h.gone()
    assert h.phase() is None


# ------------------------------------------------------------------------------ restart


def test_the_first_crash_after_ready_restarts_at_once_but_only_when_gone(h):
    h.ready()
    effects = h.exited(kind="oom", words="out of memory")
    assert Signal("a", "KILL") in effects
    assert not of(effects, Spawn)
    assert (h.phase(), h.report().exit_kind) == ("backoff", "oom")
    assert of(h.gone(), Spawn) == [Spawn("a")]
    assert (h.phase(), h.report().restarts) == ("starting", 1)
    h.healthy()
    assert h.report().reason is None


def test_restarts_wait_longer_and_longer_then_it_is_given_up(h):
    h.ready()
    waits = []
    for _ in range(3):
        h.exited()
        h.gone()
        waited = 0.0
        while h.phase() == "backoff":
            h.tick(0.5)
            waited += 0.5
        waits.append(waited)
    assert waits == [0.0, 1.0, 2.0]
    h.exited(words="the fourth")
    report = h.report()
    assert (report.phase, report.restarts) == ("failed", 3)
    assert "3 restarts" in report.reason
    assert "the fourth" in report.reason
    h.gone()
    h.tick(1e6)
    assert h.phase() == "failed"


def test_a_replica_that_never_was_ready_waits_before_its_first_restart(h):
    h.command(start())
    h.exited()
    assert not of(h.gone(), Spawn)
    assert of(h.tick(0.5), Spawn) == [Spawn("a")]


def test_a_minute_of_being_ready_forgives_earlier_crashes(h):
    h.ready()
    for _ in range(10):
        h.tick(61.0)
        h.exited()
        assert of(h.gone(), Spawn)
        h.healthy()
    assert h.report().restarts == 10


@pytest.mark.parametrize("kind", ["bad_argument", "bad_model"])
def test_what_a_restart_cannot_mend_is_never_restarted(h, kind):
    h.command(start())
    h.exited(kind=kind, words="no such thing")
    h.gone()
    h.tick(1000.0)
    report = h.report()
    assert (report.phase, report.exit_kind, report.reason) == ("failed", kind, "no such thing")


def test_a_hung_engine_is_killed_and_restarted(h):
    h.ready()
    h.healthy(healthy=False)
    h.tick(20.0)
    h.healthy()
    h.healthy(healthy=False)
    assert not of(h.tick(29.0), Signal)
    h.healthy(healthy=False)
    assert of(h.tick(1.0), Signal) == [Signal("a", "KILL")]
    assert h.report().exit_kind == "hung"
    h.exited(kind="killed", words="by us")
    assert h.report().exit_kind == "hung"
    assert of(h.gone(), Spawn)


def test_backoff_is_bounded():
    assert [backoff_s(n) for n in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 30.0]


# ------------------------------------------------------------------------------ the rest


def test_idle_time_grows_between_two_looks(h):
    h.ready()
    assert h.report().idle_for_s is None
    h.status(0, idle_for_s=3.0)
    h.now += 2.0
    assert h.report().idle_for_s == 5.0
    h.status(1, idle_for_s=0.0)
    h.now += 2.0
    assert h.report().idle_for_s == 0.0


def test_shutdown_drains_all_and_takes_no_start(h):
    h.ready("a")
    h.command(start("b", devices=("d1",)))
    effects = h(ShutdownRequested, grace_s=30.0)
    assert of(effects, Signal) == [Signal("b", "KILL")]
    assert of(h.command(start("c")), Refused)
    h.gone("b")
    h.status(0, "a")
    assert not h.core.finished
    h.gone("a")
    assert h.core.finished


def test_a_hard_shutdown_kills_what_drains(h):
    h.ready()
    h.status(1)
    h(ShutdownRequested, grace_s=30.0)
    assert of(h(ShutdownRequested, grace_s=0.0, hard=True), Signal)[-1] == Signal("a", "KILL")


def saved_of(h, replica_id="a"):
    return msgspec.json.decode(msgspec.json.encode(h.core.saved(replica_id)), type=Saved)


def adopt(saved, **fields):
    heir = Harness()
    return heir, heir(Adopted, saved=saved, **fields)


def test_a_healthy_engine_is_adopted_as_it_was(h):
    h.ready(epoch=7)
    heir, effects = adopt(saved_of(h), alive=True, healthy=True, age_s=500.0)
    assert not of(effects, Spawn)
    assert not of(effects, Signal)
    assert heir.phase() == "ready"
    assert heir.core.epoch == 7


def test_a_starting_engine_is_adopted_with_the_time_it_has_left(h):
    h.command(start())
    heir, _ = adopt(saved_of(h), alive=True, age_s=90.0)
    assert heir.phase() == "starting"
    heir.tick(11.0)
    assert heir.phase() == "failed"


def test_a_ready_engine_that_does_not_answer_is_hung_not_slow(h):
    h.ready()
    heir, _ = adopt(saved_of(h), alive=True, healthy=False, age_s=5000.0)
    assert heir.phase() == "ready"
    assert Signal("a", "KILL") in heir.tick(30.0)
    assert heir.report().exit_kind == "hung"


def test_an_engine_that_died_unseen_is_restarted(h):
    h.ready()
    heir, effects = adopt(saved_of(h), alive=False)
    assert Signal("a", "KILL") in effects
    assert "no agent" in heir.report().reason
    assert of(heir.gone(), Spawn)


def test_a_failed_replica_stays_failed(h):
    h.command(start())
    h.exited(kind="bad_model", words="no weights")
    heir, _ = adopt(saved_of(h), alive=False)
    heir.gone()
    heir.tick(1000.0)
    assert (heir.phase(), heir.report().reason) == ("failed", "no weights")


@pytest.mark.parametrize("alive", [True, False])
def test_a_stop_under_way_goes_on(h, alive):
    h.ready()
    h.status(1)
    h.command(stop())
    heir, effects = adopt(saved_of(h), alive=alive, healthy=alive)
    if alive:
        assert heir.phase() == "draining"
        assert of(heir.status(0), Signal) == [Signal("a", "TERM")]
    else:
        assert Signal("a", "KILL") in effects
    heir.gone()
    assert heir.phase() is None


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


def test_a_sleep_counts_what_is_in_flight_anew(h):
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
    h.tick(core.STATUS_S)
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
    assert not of(h.command(wake()), Refused)
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
    (refused,) = of(h.command(sleep("b")), Refused)
    assert "sleep: off" in refused.error
    h.command(start("c", devices=("d2",)))
    (refused,) = of(h.command(sleep("c")), Refused)
    assert "starting" in refused.error
    assert [h.phase(x) for x in "abc"] == ["ready", "ready", "starting"]
    assert (h.report("a").rungs, h.report("b").rungs) == ((1,), ())


@pytest.mark.parametrize("command", [sleep("x"), wake("x")])
def test_an_unknown_replica_neither_sleeps_nor_wakes(h, command):
    (refused,) = of(h.command(command), Refused)
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
            assert of(h.command(command), Refused), command
    assert [h.phase(x) for x in "ab"] == ["draining", "failed"]


def test_starts_sleeps_and_wakes_take_turns_on_a_device(h):
    h.asleep("a")
    h.ready("b")
    h.command(sleep("b"))
    assert of(h.status(0, "b"), SleepEngine)
    assert not of(h.command(wake("a")), WakeEngine)
    h.now += 1.0
    assert not of(h.command(start("c")), Spawn)
    assert (h.phase("a"), h.phase("c")) == ("waking", "starting")
    assert of(h.command(start("e", devices=("d1",))), Spawn)
    h.now += 1.0
    effects = h.slept("b")
    assert of(effects, WakeEngine) == [WakeEngine("a", 1)]
    assert not of(effects, Spawn)
    h.now += 1.0
    effects = h.woken("a")
    assert of(effects, Spawn) == [Spawn("c")]
    assert h.report("a").wake_s == 1.0  # without the time it waited


def test_waiting_for_a_device_is_no_part_of_a_sleeps_time(h):
    h.ready("a")
    h.command(start("b"))
    h.command(sleep("a"))
    h.status(0, "a")
    h.tick(90.0)
    assert h.phase("a") == "sleeping"
    h.healthy("b")
    assert not of(h.tick(core.SLEEP_S), Signal)
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
        assert not of(h.tick(core.SLEEP_S if what == "sleep" else core.WAKE_S), Signal)
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
    (refused,) = of(h.command(sleep(level=1)), Refused)
    assert report.disabled["asleep-1"] in refused.error
    assert not of(h.command(sleep(level=2)), Refused)
    heir = Harness(disabled=h.core.disabled)
    heir.ready("z")
    assert heir.report("z").disabled == report.disabled
    assert of(heir.command(sleep("z")), Refused)
    heir.ready("y", devices=("d1",), spec=msgspec.structs.replace(SPEC, source="elsewhere"))
    assert heir.report("y").disabled == {}


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
    assert Signal("b", "KILL") in h.tick(core.HUNG_S)
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
    heir, effects = adopt(saved_of(h), alive=True, healthy=True, sleeping=True)
    assert not of(effects, Signal)
    report = heir.report()
    assert (report.phase, report.sleep_level, report.residue_bytes) == ("asleep", 2, 7)
    assert report.rungs == (1, 2)
    assert of(heir.command(wake()), WakeEngine) == [WakeEngine("a", 2)]


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
    heir, effects = adopt(saved_of(h), alive=True, healthy=True, sleeping=sleeping, residue_bytes=9)
    if sleeping is False:
        assert of(effects, WakeEngine) == [WakeEngine("a", 1)]
        assert heir.phase() == "waking"
        heir.woken()
        assert heir.phase() == "ready"
    else:
        assert heir.phase() == "asleep"
        assert heir.report().residue_bytes == (9 if phase == "sleeping" else 7)


def test_one_that_drained_to_sleep_is_adopted_ready(h):
    h.ready()
    h.status(1)
    h.command(sleep())
    heir, effects = adopt(saved_of(h), alive=True, healthy=True)
    assert not of(effects, Signal)
    assert (heir.phase(), heir.report().sleep_level) == ("ready", 0)


def test_a_sleeper_that_died_unseen_is_left_to_the_scheduler(h):
    h.asleep()
    heir, effects = adopt(saved_of(h), alive=False)
    assert Signal("a", "KILL") in effects
    assert not of(heir.gone(), Spawn)
    assert heir.phase() == "failed"


def test_a_sleeper_that_does_not_answer_after_an_adoption_is_hung(h):
    h.asleep()
    heir, _ = adopt(saved_of(h), alive=True, healthy=False)
    assert heir.phase() == "asleep"
    assert Signal("a", "KILL") in heir.tick(core.HUNG_S)


# ------------------------------------------------------------------------------ random walks


class AgentWalk(RuleBasedStateMachine):
    """A world of a few replicas and devices that sends whatever could happen, in any order."""

    ids = st.sampled_from(["a", "b", "c", "e"])
    devices = st.sampled_from([("d0",), ("d1",), ("d0", "d1")])

    def __init__(self) -> None:
        super().__init__()
        self.core = AgentCore(start_timeout_s=50.0, max_restarts=2, rungs=lambda spec: (1, 2))
        self.now = 0.0
        self.epoch = 1
        self.busy: dict[str, str] = {}  # replica -> what its engine was told last
        self.spawned: set[str] = set()
        self.killing: set[str] = set()
        self.last: list[messages.Effect] = []

    def give(self, event: messages.Event) -> None:
        self.last = self.core.handle(event)
        for effect in self.last:
            if isinstance(effect, Spawn):
                assert effect.replica_id not in self.spawned, "spawned before Gone"
                self.spawned.add(effect.replica_id)
            elif isinstance(effect, Signal) and effect.signal == "KILL":
                assert effect.replica_id in self.spawned, "killed without a process"
                self.killing.add(effect.replica_id)
                self.busy.pop(effect.replica_id, None)
            elif isinstance(effect, SleepEngine | WakeEngine):
                assert effect.replica_id in self.spawned, "told to sleep without a process"
                assert effect.replica_id not in self.killing, "told to sleep while it is killed"
                assert effect.replica_id not in self.busy, "told twice"
                assert self.core.replicas[effect.replica_id].in_flight == 0, "a request is lost"
                self.busy[effect.replica_id] = type(effect).__name__
            elif isinstance(effect, ForgetRecord):
                assert effect.replica_id not in self.spawned, "forgotten before Gone"

    @rule(seconds=st.floats(0.0, 40.0))
    def tick(self, seconds):
        self.now += seconds
        self.give(Tick(now=self.now))

    @rule(replica_id=ids, devices=devices, newer=st.booleans())
    def start(self, replica_id, devices, newer):
        self.epoch += newer
        command = start(replica_id, self.epoch, devices)
        self.give(CommandReceived(now=self.now, command=command))

    @rule(replica_id=ids, grace_s=st.sampled_from([0.0, 5.0, 60.0]))
    def stop(self, replica_id, grace_s):
        self.give(CommandReceived(now=self.now, command=stop(replica_id, self.epoch, grace_s)))

    @rule(replica_id=ids, level=st.sampled_from([1, 2]), grace_s=st.sampled_from([0.0, 5.0, 60.0]))
    def sleep(self, replica_id, level, grace_s):
        command = sleep(replica_id, self.epoch, level, grace_s)
        self.give(CommandReceived(now=self.now, command=command))
        assert not of(self.last, Signal), "a sleep kills nothing"

    @rule(replica_id=ids)
    def wake(self, replica_id):
        self.give(CommandReceived(now=self.now, command=wake(replica_id, self.epoch)))
        assert not of(self.last, Signal), "a wake kills nothing"

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), how=st.sampled_from(["well", "well", "wrong", "untouched"]))
    def done(self, data, how):
        replica_id = data.draw(st.sampled_from(sorted(self.busy)))
        error = None if how == "well" else "words"
        if self.busy.pop(replica_id) == "WakeEngine":
            self.give(WakeEnded(now=self.now, replica_id=replica_id, error=error))
            return
        untouched = how == "untouched"
        event = SleepEnded(now=self.now, replica_id=replica_id, error=error, untouched=untouched)
        self.give(event)

    @rule(replica_id=ids)
    def late_words(self, replica_id):
        """What an earlier task says of a replica that is not busy changes nothing."""
        if replica_id not in self.busy:
            before = self.phases()
            self.give(SleepEnded(now=self.now, replica_id=replica_id))
            self.give(WakeEnded(now=self.now, replica_id=replica_id, error="late"))
            assert self.phases() == before

    def phases(self):
        return {replica_id: r.phase for replica_id, r in self.core.replicas.items()}

    @rule(replica_id=ids, healthy=st.booleans())
    def health(self, replica_id, healthy):
        self.give(HealthChanged(now=self.now, replica_id=replica_id, healthy=healthy))

    @rule(replica_id=ids, in_flight=st.integers(0, 2))
    def status(self, replica_id, in_flight):
        event = StatusSeen(
            now=self.now, replica_id=replica_id, in_flight=in_flight, idle_for_s=None
        )
        self.give(event)

    @rule(replica_id=ids, kind=st.sampled_from(["crash", "oom", "bad_model", "exited"]))
    def exit(self, replica_id, kind):
        if replica_id in self.spawned:
            self.busy.pop(replica_id, None)
            self.give(ProcessExited(now=self.now, replica_id=replica_id, kind=kind, words="w"))

    @precondition(lambda self: self.killing)
    @rule(data=st.data())
    def gone(self, data):
        replica_id = data.draw(st.sampled_from(sorted(self.killing)))
        self.killing.discard(replica_id)
        self.spawned.discard(replica_id)
        self.give(Gone(now=self.now, replica_id=replica_id))

    @rule(hard=st.booleans())
    def shutdown(self, hard):
        if hard or self.now > 300.0:
            self.give(ShutdownRequested(now=self.now, grace_s=5.0, hard=hard))

    @invariant()
    def rules_are_kept(self):
        self.core.validate_state()
        assert {r for r, x in self.core.replicas.items() if x.tree} == self.spawned
        begun = {r for r, x in self.core.replicas.items() if x.began_at is not None}
        assert begun == set(self.busy)
        assert list(self.core.reports(self.now)) is not None

    def teardown(self):
        """Whatever happened, shutting down hard and killing all ends everything."""
        self.give(ShutdownRequested(now=self.now, grace_s=0.0, hard=True))
        while self.killing:
            replica_id = self.killing.pop()
            self.spawned.discard(replica_id)
            self.give(Gone(now=self.now, replica_id=replica_id))
        assert self.core.finished


TestAgentWalk = AgentWalk.TestCase
TestAgentWalk.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_every_phase_has_its_edges():
    assert set(EDGES) == set(typing.get_args(ReplicaPhase))
