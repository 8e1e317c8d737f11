"""The gate's timer, on the event loop that the router runs on."""

from __future__ import annotations

import asyncio

import uvloop

from runtime.router.admission.decisions import Held
from runtime.router.admission.gate import Gate
from runtime.router.admission.refusals import Refused
from runtime.wire.routes import ModelRoute, RouteTable


def test_a_deadline_that_has_passed_already_is_a_timer_as_any_other() -> None:
    """On uvloop a call for a time that has passed gives a handle that does not know its time."""

    async def calls() -> list[str]:
        gate = Gate(10)
        gate.routes(RouteTable(version=1, models=(ModelRoute(name="m", hold_s=1e-9),)))
        held = [gate.arrive("m") for _ in range(3)]
        assert all(isinstance(one, Held) for one in held)
        turns = [gate.turn(one.request_id) for one in held]
        ended = await asyncio.gather(*turns)
        return [one.code for one in ended if isinstance(one, Refused)]

    assert uvloop.run(calls()) == ["hold_timeout"] * 3
