"""Every change of the admin API says who enters it into the audit trail, or why nobody does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from runtime.contract.config import Config
from runtime.registry.embedded import EmbeddedRegistry
from scheduler.admin.api import make_app
from scheduler.admin.route_table import ADMIN, Operation, Unaudited
from tests.kits.scheduler_parts import Scheduler


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[web.Application]:
    registry = EmbeddedRegistry(tmp_path / "registry.db")
    one = Scheduler(registry, "http://a")
    yield make_app(Config(), one.driver, one.stored, one.rules, one.access, one.leadership)
    await one.close()
    await registry.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_change_that_does_not_say_is_not_declared(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} /admin/x: audit is None: say audit="):
        Operation(method, "/admin/x", "models.x", "Change x", "it was changed")


def test_a_get_changes_nothing() -> None:
    with pytest.raises(ValueError, match="GET /admin/x: audit is 'guard': leave it out"):
        Operation("GET", "/admin/x", "models.x", "Show x", "x", audit="guard")


def test_who_is_left_out_says_why() -> None:
    reasons = {o.path: o.audit.why for o in ADMIN if isinstance(o.audit, Unaudited)}
    assert all(len(why) > 10 for why in reasons.values())
    assert reasons["/admin/plan"] == "it changes nothing"


def test_the_route_book_notes_what_its_handlers_change() -> None:
    by_book = {o.handler for o in ADMIN if o.audit == "route_book"}
    assert by_book == {
        o.handler for o in ADMIN if o.handler.startswith("rules.") and o.method != "GET"
    }


async def test_no_change_is_served_beside_the_table(app: web.Application) -> None:
    """But for what agents and routers report, which no operator does."""
    declared = {(o.method, o.path) for o in ADMIN}
    served = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    }
    assert declared <= served
    assert {
        (method, path) for method, path in served - declared if method not in ("GET", "HEAD")
    } == {
        ("POST", "/internal/heartbeat"),
        ("POST", "/internal/demand"),
        ("POST", "/internal/usage"),
    }
