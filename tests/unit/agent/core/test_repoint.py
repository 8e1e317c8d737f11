"""An engine that is pointed at another model: what the agent's core makes of each turn of it."""

from __future__ import annotations

import msgspec
import pytest

from agent.core.messages import (
    Adopted,
    CommandRefused,
    RepointEngine,
    SaveDisabled,
    Signal,
    Spawn,
    WakeEngine,
)
from tests.kits.agent_core_harness import OTHER, SPEC, Harness, of, repoint, sleep, stop, wake


def test_a_ready_replica_is_pointed_once_its_requests_are_over() -> None:
    h = Harness()
    h.ready()
    h.status(2)
    assert not of(h.command(repoint()), CommandRefused)
    assert (h.phase(), h.report().model) == ("draining", "m")
    assert not of(h.status(1), RepointEngine)
    assert of(h.status(0), RepointEngine) == [RepointEngine("a", 0)]
    report = h.report()
    assert (report.phase, report.model, report.launch_key) == (
        "waking", "other", OTHER.launch_key(),
    )  # fmt: skip
    h.now += 0.25
    h.repointed(phases={"reload": 0.2})
    report = h.report()
    assert (report.phase, report.model, report.wake_s) == ("ready", "other", 0.25)
    assert report.phases == {"reload": 0.2}
    assert report.start_s is None  # it was another model's


def test_a_sleeper_is_pointed_at_once_from_its_level() -> None:
    h = Harness()
    h.asleep(level=2)
    assert of(h.command(repoint()), RepointEngine) == [RepointEngine("a", 2)]
    assert (h.report().model, h.report().sleep_level) == ("other", 2)
    h.repointed()
    assert (h.phase(), h.report().residue_bytes) == ("ready", 0)


def test_repeating_it_changes_nothing() -> None:
    h = Harness()
    h.ready()
    h.command(repoint())
    assert not of(h.command(repoint()), CommandRefused)
    h.status(0)
    assert not of(h.command(repoint()), RepointEngine)
    h.repointed()
    assert not of(h.command(repoint()), RepointEngine)
    assert h.phase() == "ready"


def test_another_model_is_refused_while_one_is_under_way() -> None:
    h = Harness()
    h.ready()
    h.status(1)
    h.command(repoint())
    third = msgspec.structs.replace(OTHER, name="third")
    assert "is draining" in of(h.command(repoint(spec=third)), CommandRefused)[0].error
    h.status(0)
    assert "is waking" in of(h.command(repoint(spec=third)), CommandRefused)[0].error
    assert h.report().model == "other"


def test_requests_that_do_not_end_keep_the_model_that_serves() -> None:
    h = Harness()
    h.ready()
    h.status(1)
    h.command(repoint(grace_s=5.0))
    h.tick(5.0)
    h.status(1)
    assert not of(h.tick(0.0), Signal)
    report = h.report()
    assert (report.phase, report.model) == ("ready", "m")
    assert "not pointed at other: 1 requests were in flight after 5 s" in report.reason


def test_a_failure_starts_the_new_model_plainly_and_bars_it() -> None:
    h = Harness()
    h.ready()
    h.command(repoint())
    h.status(0)
    effects = h.repointed(error="its canary failed: no")
    assert of(effects, SaveDisabled)
    assert of(effects, Signal) == [Signal("a", "KILL")]
    report = h.report()
    assert (report.model, report.disabled) == ("other", {"shell": "its canary failed: no"})
    assert report.exit_kind == "repoint_failed"
    h.gone()
    assert of(h.tick(0.0), Spawn) or h.phase() == "starting"
    h.healthy()
    assert (h.phase(), h.report().model) == ("ready", "other")
    h.command(repoint(spec=SPEC))  # the other way was not barred
    h.status(0)
    h.repointed()
    assert "canary" in of(h.command(repoint()), CommandRefused)[0].error


def test_it_takes_too_long_or_dies_at_it() -> None:
    for way in ("late", "dead"):
        h = Harness()
        h.ready()
        h.command(repoint())
        h.status(0)
        effects = h.tick(121.0) if way == "late" else h.exited()
        assert of(effects, Signal) == [Signal("a", "KILL")]
        assert (h.phase(), h.report().model) == ("backoff", "other")
        assert "shell" in h.report().disabled


def test_a_stop_ends_the_drain_for_it() -> None:
    h = Harness()
    h.ready()
    h.status(1)
    h.command(repoint())
    h.command(stop())
    h.status(0)
    assert (h.phase(), h.report().model) == ("stopping", "m")


def test_what_does_not_serve_is_not_pointed() -> None:
    h = Harness()
    h.command(stop("gone"))
    assert "is not on this node" in of(h.command(repoint("b")), CommandRefused)[0].error
    h.ready()
    h.command(sleep())
    words = of(h.command(repoint()), CommandRefused)[0].error
    assert words == "a is draining: only a ready or sleeping replica is pointed at another model"


def test_neither_sleep_nor_wake_comes_between() -> None:
    h = Harness()
    h.ready()
    h.status(1)
    h.command(repoint())
    assert of(h.command(sleep()), CommandRefused)
    assert not of(h.command(wake()), WakeEngine)
    h.status(0)
    assert h.phase() == "waking"
    h.woken()  # a late word of an earlier wake
    assert h.phase() == "waking"


@pytest.mark.parametrize(("phase", "then"), [("draining", "ready"), ("waking", "backoff")])
def test_the_next_agent_finds_it_half_way(phase: str, then: str) -> None:
    h = Harness()
    h.ready()
    h.status(1)
    h.command(repoint())
    if phase == "waking":
        h.status(0)
    assert h.phase() == phase
    saved = h.core.saved("a")
    following = Harness()
    following(Adopted, saved=saved, alive=True, healthy=True, age_s=9.0)
    assert following.phase() == then
    assert following.report().model == ("m" if phase == "draining" else "other")
    assert ("shell" in following.report().disabled) == (phase == "waking")
