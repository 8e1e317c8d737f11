"""Whether to keep a model warm, let it go, or warm it ahead of a call. Pure.

Holding a model warm costs what others could do with the room; being cold costs the seconds the
next call waits. Both in seconds of waiting, so that they may be weighed:

    price    a second: bytes held / bytes the coldest victim frees x its expected cost / HORIZON_S
    gain(w)  chance(w) x seconds to climb - price x w x (1 - chance(w) / 2)

for a hold of w seconds; it ends with the call, so where one comes half of w is paid on average.

Worked example: 10 GiB; the coldest victim would free 20 GiB for 3 s of expected waiting: price
0.5 x 3 / 600 = 0.0025 a second. A call comes within the next 600 s with chance 0.6, the climb takes
40 s: 0.6 x 40 - 0.0025 x 600 x 0.7 = 22.95 s gained: it stays warm. With a chance of 0.02 it would
be 0.8 - 1.49 < 0: it goes.

Floors are what operators and schedules ask for, whatever it costs.

Rules this file keeps: a floor's wall-clock time comes in as an argument; advice is only that: the
integrator gives prewarms free room or the room of colder models, never of one that is called;
without history there is no opinion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtime.contract.prewarm import Ask, floor_at
from runtime.wire.names import Floor
from scheduler.policy.ladder import HORIZON_S, climb_s
from scheduler.signals.forecast import Arrivals
from scheduler.state.cluster import Model

LEAD = 1.5  # how many times the climb a prewarm begins before the call: climbs vary
HOLDS_S = (60.0, 120.0, 300.0, 600.0, 1200.0, 2400.0, 3600.0)  # holds that are weighed
MIN_GAIN_S = 0.05  # seconds of waiting: what is less is noise and settles nothing


@dataclass(frozen=True, slots=True)
class KeepWarm:
    """Stay, or become, warm now, and ask again at `until`."""

    until: float
    gain_s: float


@dataclass(frozen=True, slots=True)
class LetGo:
    """Worth nothing now; begin to climb at `prewarm_at` (None: only when called)."""

    prewarm_at: float | None
    gain_s: float  # of the prewarm


Advice = KeepWarm | LetGo | None  # None: no opinion, the idle timer decides


def hold_price(held_bytes: int, frees_bytes: int, cost_s: float) -> float:
    """Seconds of waiting that holding costs others, each second.

    `frees_bytes` and `cost_s` are those of the cheapest descent elsewhere that would make as much
    room (`ladder.Descent`); 0 bytes or cost, where there is free room, cost nothing.
    """
    if held_bytes <= 0 or frees_bytes <= 0 or not cost_s > 0:
        return 0.0
    return held_bytes / frees_bytes * cost_s / HORIZON_S


def gain_s(chance: float, climb_s: float, price: float, hold_s: float) -> float:
    """Expected seconds of waiting saved by holding for `hold_s` or until called, less the price."""
    return chance * climb_s - price * hold_s * (1 - chance / 2)


def advise(arrivals: Arrivals, now: float, wall_s: float, climb_s: float, price: float) -> Advice:
    """What to do with a model that has nothing in flight, whether it is warm or cold.

    Worked example: called every hour on the hour, 5 s ago; the climb takes 40 s, price 0.01 a
    second. Keeping it would cost about 0.01 x 3300 = 33 s and gain 40, a prewarm 60 s before the
    window costs a fraction and gains the same: LetGo(prewarm_at) it is.
    """
    if arrivals.last_at is None:
        return None
    window = arrivals.next_window(now, wall_s)
    hold = _best_hold(arrivals, now, wall_s, climb_s, price)
    if window is None:
        return hold if arrivals.known(now) and hold.gain_s >= MIN_GAIN_S else None
    earliest, latest = window
    start = max(now, earliest - LEAD * climb_s)
    before = arrivals.chance(now, wall_s, start - now)
    within = arrivals.chance(now, wall_s, latest - now) - before
    # Of the window's hold only what follows `start` is paid for, and only if no call came before.
    late = within / (1 - before) if before < 1 else 0.0
    ahead = (1 - before) * gain_s(min(1.0, late), climb_s, price, latest - start)
    if start > now and ahead >= max(hold.gain_s, MIN_GAIN_S):
        return LetGo(start, ahead)
    if start <= now and ahead >= max(hold.gain_s, MIN_GAIN_S):
        return KeepWarm(latest, ahead)
    return hold if hold.gain_s >= MIN_GAIN_S else LetGo(None, 0.0)


def _best_hold(
    arrivals: Arrivals, now: float, wall_s: float, climb_s: float, price: float
) -> KeepWarm:
    """The hold from now on that gains most."""
    found = (
        KeepWarm(now + s, gain_s(arrivals.chance(now, wall_s, s), climb_s, price, s))
        for s in HOLDS_S
    )
    return max(found, key=lambda hold: (hold.gain_s, -hold.until))


def changed_floors(
    models: Mapping[str, Model], asks: Mapping[str, tuple[Ask, ...]], wall_s: float
) -> Iterator[tuple[str, Floor | None]]:
    """Each model whose floor at unix time `wall_s` is another than it has, and that floor.

    `asks`: of operators, by model. Worked example: a climb of 40 s to be over by 8:00 begins
    1.5 x 40 = 60 s before, at 7:59.
    """
    for name, model in list(models.items()):
        prewarm, wishes = model.spec.prewarm, asks.get(name, ())
        if not (wishes or prewarm.min_warm or prewarm.schedule or model.floor):
            continue
        floor = floor_at(prewarm, wishes, wall_s, LEAD * climb_s(model, 0))
        if floor != model.floor:
            yield name, floor
