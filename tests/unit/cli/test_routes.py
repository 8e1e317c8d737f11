"""`stoker route …` and `stoker audit`: what is sent, what is said, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.wire.routes import Canary, Mirror, RouteRule, RouteTarget
from scheduler.admin import route_views as views
from scheduler.audit import AuditEntry
from tests.kits.cli_runner import FakeServer, error, serving, stoker

RULE = RouteRule(
    name="r",
    targets=(RouteTarget(model="a", weight=90, version="1.0.0"), RouteTarget(model="b", weight=10)),
)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def route(**more: Any) -> views.RouteView:
    targets = tuple(
        views.TargetView(
            model=t.model, version=t.version, share=t.weight, warmth="hot", ready=1, requests=40,
            errors=2, mean_ttft_s=0.25,
        )
        for t in RULE.targets
    )  # fmt: skip
    known: dict[str, Any] = {"name": "r", "rule": RULE, "targets": targets, "since_s": 61.0}
    return views.RouteView(**(known | more))


def entry(**more: Any) -> AuditEntry:
    facts: dict[str, Any] = {
        "number": 7, "at": "2026-11-25T05:00:00.000+00:00", "who": "canary", "action": "rollback",
        "subject": "route r", "reason": "3 errors in 5 requests",
        "old": msgspec.to_builtins(RULE), "new": None,
    }  # fmt: skip
    return AuditEntry(**facts | more)


def sent(fake: FakeServer, *flags: str) -> RouteRule:
    fake.replies["PUT /admin/routes/r"] = (201, route())
    done = stoker(fake, "route", "set", "r", *flags)
    assert done.exit_code == 0, done.output
    assert done.output == "r: a 90 %, b 10 %\n"
    return msgspec.json.decode(fake.bodies("PUT /admin/routes/r")[-1], type=RouteRule)


def test_flags_say_a_whole_rule(fake: FakeServer) -> None:
    made = sent(
        fake, "--to", "a=3@1.0.0", "--to", "b", "--sticky", "header:X-User", "--fallback", "c",
        "--fallback", "d", "--mirror", "s=0.25",
    )  # fmt: skip
    assert made == RouteRule(
        name="r",
        targets=(RouteTarget(model="a", weight=3, version="1.0.0"), RouteTarget(model="b")),
        sticky="header:X-User",
        fallback=("c", "d"),
        mirror=Mirror(model="s", share=0.25),
    )


def test_a_canary_is_a_target_with_the_weight_of_its_first_step(fake: FakeServer) -> None:
    made = sent(fake, "--to", "a", "--canary", "b", "--steps", "2,50", "--interval", "9")
    assert made.canary == Canary(model="b", steps=(2, 50), interval_s=9)
    assert [(t.model, t.weight) for t in made.targets] == [("a", 98), ("b", 2)]


def test_a_file_may_hold_several_routes(fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(
        "routes:\n- {name: r, targets: [{model: a}]}\n- {name: s, targets: [{model: b}]}"
    )
    for name in ("r", "s"):
        fake.replies[f"PUT /admin/routes/{name}"] = route(name=name)
    done = stoker(fake, "route", "set", str(path), "--json")
    assert [json.loads(line)["name"] for line in done.output.splitlines()] == ["r", "s"]
    path.write_text("{name: r, targets: [{modle: a}], sticky: maybe}")
    done = stoker(fake, "route", "set", str(path))
    assert done.exit_code == 1
    for words in ("targets[0].modle: is not a known field", "did you mean 'model'?", "sticky: "):
        assert words in done.output
    assert "give it --to" in stoker(fake, "route", "set", "no-such-file").output


def test_flags_that_make_no_sense_are_usage_errors(fake: FakeServer) -> None:
    for flags in (
        ("--to", "a=many"),
        ("--to", "a", "--steps", "5"),
        ("--to", "a", "--canary", "b", "--steps", "5,x"),
    ):
        assert stoker(fake, "route", "set", "r", *flags).exit_code == 2
    assert fake.asked == []


def test_ls_and_show_say_what_is_under_way(fake: FakeServer) -> None:
    canary = views.CanaryView(
        model="b", step=1, steps=3, share=10.0, in_step_s=5.0, waits_for="5 s of interval_s 300 s"
    )
    fake.replies["GET /admin/routes"] = views.Routes(routes=(route(canary=canary),))
    listed = stoker(fake, "route", "ls").output
    for words in ("a 90 %, b 10 %", "canary b 10 %, step 1 of 3: 5 s of interval_s 300 s"):
        assert words in listed
    switch = views.SwitchView(to="b", ready=0, replicas=2, deadline_s=90.0, problem="no room")
    fake.replies["GET /admin/routes/r"] = route(switch=switch)
    shown = stoker(fake, "route", "show", "r").output
    for words in ("1.0.0", "0.250s", "switch to b: 0/2 ready (no room), given up in 1m 30s"):
        assert words in shown
    fake.replies["GET /admin/routes"] = views.Routes(routes=())
    assert "stoker route set" in stoker(fake, "route", "ls").output


def test_switch_waits_and_tells_why_it_was_given_up(fake: FakeServer) -> None:
    pending = views.SwitchView(to="b", ready=0, replicas=1, deadline_s=9.0)
    moved = tuple(
        msgspec.structs.replace(t, share=100.0 * (t.model == "b")) for t in route().targets
    )
    fake.replies["POST /admin/routes/r/switch"] = (202, route(switch=pending))
    fake.replies["GET /admin/routes/r"] = [route(switch=pending), route(targets=moved)]
    done = stoker(fake, "route", "switch", "r", "b", "--deadline", "9")
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "r: a 0 %, b 100 %")
    (body,) = fake.bodies("POST /admin/routes/r/switch")
    assert json.loads(body) == {"to": "b", "deadline_s": 9.0}
    fake.replies["GET /admin/routes/r"] = route()
    failed = entry(action="switch_failed", reason="0 of 1 of b were ready after 9 s")
    fake.replies["GET /admin/audit"] = views.Audit(audit=(failed,))
    done = stoker(fake, "route", "switch", "r", "b")
    assert (done.exit_code, "0 of 1 of b were ready after 9 s" in done.output) == (1, True)


def test_promote_rollback_and_rm(fake: FakeServer) -> None:
    for action in ("promote", "rollback"):
        fake.replies[f"POST /admin/routes/r/{action}"] = route()
        assert stoker(fake, "route", action, "r", "--reason", "why not").exit_code == 0
        assert fake.bodies(f"POST /admin/routes/r/{action}") == [b'{"reason":"why not"}']
    fake.replies["DELETE /admin/routes/r"] = (204, b"")
    assert stoker(fake, "route", "rm", "r").output == "removed r\n"
    fake.replies["DELETE /admin/routes/q"] = (404, error("there is no route 'q'"))
    done = stoker(fake, "route", "rm", "q")
    assert (done.exit_code, "there is no route 'q'" in done.output) == (1, True)


def test_audit_shows_who_when_what_and_why(fake: FakeServer) -> None:
    fake.replies["GET /admin/audit"] = views.Audit(audit=(entry(),))
    shown = stoker(fake, "audit", "--route", "r").output
    for words in ("2026-11-25T05:00:00Z ", "canary", "rollback", "a 90, b 10", "3 errors in 5"):
        assert words in shown
    assert fake.asked[0][0] == "GET /admin/audit?limit=20&route=r"
    assert json.loads(stoker(fake, "audit", "--json").output)["audit"][0]["number"] == 7
