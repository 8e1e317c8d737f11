"""The agent's core: start, stop, restart, shutdown and adoption, a test for each rule."""

from __future__ import annotations

import typing

import pytest

from agent.core.messages import (
    CommandRefused,
    ForgetRecord,
    SaveEpoch,
    SendHeartbeatNow,
    ShutdownRequested,
    Signal,
    Spawn,
    TermSeen,
)
from agent.core.replica import EDGES
from agent.core.transitions import backoff_s
from runtime.wire.agent_messages import ReplicaPhase
from tests.kits.agent_core_harness import SPEC, Harness, adopt, of, saved_of, start, stop


@pytest.fixture
def h() -> Harness:
    return Harness()


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
    (refused,) = of(h.command(start()), CommandRefused)
    assert not refused.stale
    assert "draining" in refused.error
    h.status(0)
    h.gone()
    (refused,) = of(h.command(start()), CommandRefused)
    assert "was stopped" in refused.error


def test_a_stop_that_overtook_its_start_wins(h):
    assert h.command(stop()) == [SaveEpoch(1)]
    assert of(h.command(start()), CommandRefused)
    assert h.phase() is None


@pytest.mark.parametrize("replica_id", ["../x", "", "a/b", "a b", "x" * 201])
def test_an_id_that_is_no_file_name_is_refused(h, replica_id):
    assert of(h.command(start(replica_id)), CommandRefused)
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


def test_draining_looks_again_even_where_nothing_was_in_flight(h):
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
    assert h.report().died == "out of memory"


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
def test_what_a_restart_cannot_fix_is_never_restarted(h, kind):
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
    assert of(h.command(start("c")), CommandRefused)
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


def test_a_healthy_engine_is_adopted_as_it_was(h):
    h.ready(epoch=7)
    successor, effects = adopt(saved_of(h), alive=True, healthy=True, age_s=500.0)
    assert not of(effects, Spawn)
    assert not of(effects, Signal)
    assert successor.phase() == "ready"
    assert successor.core.epoch == 7


def test_a_starting_engine_is_adopted_with_the_time_it_has_left(h):
    h.command(start())
    successor, _ = adopt(saved_of(h), alive=True, age_s=90.0)
    assert successor.phase() == "starting"
    successor.tick(11.0)
    assert successor.phase() == "failed"


def test_a_ready_engine_that_does_not_answer_is_hung_not_slow(h):
    h.ready()
    successor, _ = adopt(saved_of(h), alive=True, healthy=False, age_s=5000.0)
    assert successor.phase() == "ready"
    assert Signal("a", "KILL") in successor.tick(30.0)
    assert successor.report().exit_kind == "hung"


def test_an_engine_that_died_unseen_is_restarted(h):
    h.ready()
    successor, effects = adopt(saved_of(h), alive=False)
    assert Signal("a", "KILL") in effects
    assert "no agent" in successor.report().reason
    assert of(successor.gone(), Spawn)


def test_a_failed_replica_stays_failed(h):
    h.command(start())
    h.exited(kind="bad_model", words="no weights")
    successor, _ = adopt(saved_of(h), alive=False)
    successor.gone()
    successor.tick(1000.0)
    assert (successor.phase(), successor.report().reason) == ("failed", "no weights")


@pytest.mark.parametrize("alive", [True, False])
def test_a_stop_under_way_goes_on(h, alive):
    h.ready()
    h.status(1)
    h.command(stop())
    successor, effects = adopt(saved_of(h), alive=alive, healthy=alive)
    if alive:
        assert successor.phase() == "draining"
        assert of(successor.status(0), Signal) == [Signal("a", "TERM")]
    else:
        assert Signal("a", "KILL") in effects
    successor.gone()
    assert successor.phase() is None


def test_every_phase_has_its_edges():
    assert set(EDGES) == set(typing.get_args(ReplicaPhase))
