"""How warm a model must be at a given time, by its spec's schedule and what operators asked. Pure.

Rules this file keeps: wall-clock time comes in as an argument; a schedule means *by* its time, so
the climb begins earlier by what it is expected to take.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from msgspec import Struct

from runtime.wire.agent_messages import SpecProblem
from runtime.wire.model_spec import Prewarm, PrewarmWindow
from runtime.wire.names import Floor

WARMEST_FIRST: tuple[Floor, ...] = ("hot", "asleep", "staged")


class Ask(Struct, frozen=True, kw_only=True):
    """An operator's one-time wish: at least on `rung` from `by` (unix seconds) for `for_s`."""

    rung: Floor
    by: float
    for_s: float


def floor_at(prewarm: Prewarm, asks: Iterable[Ask], wall_s: float, lead_s: float) -> Floor | None:
    """The rung the model must stand on at unix time `wall_s`; None: any.

    Each window and each ask counts `lead_s` early. Worked example: cron "0 8 * * *" for 3600 s in
    UTC with a lead of 60 s holds from 07:59:00 until 09:00:00.
    """
    rungs = [prewarm.min_warm] if prewarm.min_warm else []
    rungs += [w.rung for w in prewarm.schedule if _open(w, wall_s, lead_s)]
    rungs += [a.rung for a in asks if a.by - lead_s <= wall_s < a.by + a.for_s]
    return next((rung for rung in WARMEST_FIRST if rung in rungs), None)


def _open(window: PrewarmWindow, wall_s: float, lead_s: float) -> bool:
    # The latest start that is not later than now plus the lead; cronsim looks strictly before.
    until = datetime.fromtimestamp(wall_s + lead_s + 1.0, ZoneInfo(window.timezone))
    started = next(CronSim(window.cron, until, reverse=True), None)
    return started is not None and wall_s < started.timestamp() + window.for_s


def schedule_problems(prewarm: Prewarm) -> Iterable[SpecProblem]:
    """What is wrong with a schedule: each bad cron expression and time zone."""
    for index, window in enumerate(prewarm.schedule):
        where = f"prewarm.schedule[{index}]"
        try:
            ZoneInfo(window.timezone)
        except (ValueError, KeyError, OSError):
            yield SpecProblem(
                field=f"{where}.timezone", value=window.timezone, message="is not a time zone",
                fix="use an IANA name such as Europe/Berlin or UTC",
            )  # fmt: skip
            continue
        try:
            CronSim(window.cron, datetime.fromtimestamp(0, ZoneInfo(window.timezone)))
        except CronSimError as error:
            yield SpecProblem(
                field=f"{where}.cron", value=window.cron, message=f"is not a schedule: {error}",
                fix="write minute hour day month weekday, e.g. '0 8 * * 1-5'",
            )  # fmt: skip
