"""When a model will be called next, from a sketch of when it was called. Pure.

Two sketches a model, 1.3 KB in memory and under 0.4 KB stored:

- a histogram of the gaps between calls, in bins that grow by a factor of 1.2 from 1 s to 1 day, as
  in the hybrid histogram policy of Shahrad et al., "Serverless in the Wild" (USENIX ATC 2020);
- a profile of the day: on which share of days was there a call in each quarter of an hour (UTC).

Both are forgotten by half in HALF_LIFE_S. A call within the horizon h, t seconds after the last:

    gaps    q(h) = (gaps in t..t+h) / (gaps longer than t)
    prior   p(h) = h / (h + t)                     what `policy/ladder.py: call_chance` takes
    both    c(h) = (n q + PRIOR_WEIGHT p) / (n + PRIOR_WEIGHT),  n = gaps longer than t

and then the hazard -ln(1 - c) of each quarter of an hour ahead is multiplied by how much busier
than the day's mean that quarter was (0 to BUSIEST): chance = 1 - exp(-sum of them).

Worked example: 8 gaps so far, all of 300 s; idle for 120 s; the next 240 s. q = 8/8, p = 240/360,
so c = (8 x 1 + 1 x 0.67) / 9 = 0.96, where the prior alone says 0.67. Idle for 400 s: no gap was
ever that long, n = 0, and the prior's 240/640 = 0.375 is all there is.

Rules this file keeps: `now` is a clock that never steps back (or is taken as standing still);
`wall_s` only says what time of day it is, so a wall clock that jumps ages nothing; a chance is in
0..1 and never less for a longer horizon.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field

from msgspec import Struct

BINS = 64
DAY_S = 86400.0
# The upper edges of all gap bins but the last: 1 s, 1.2 s … 1 day.
EDGES = tuple(DAY_S ** (i / (BINS - 2)) for i in range(BINS - 1))
SLOTS = 96
SLOT_S = DAY_S / SLOTS
HALF_LIFE_S = 7 * DAY_S
CAP = 256.0  # of one bin: then it is halved, so that floods of short gaps drown no long one
RATE_TAU_S = 300.0
PRIOR_WEIGHT = 1.0  # gaps that the prior is worth
FLAT_DAYS = 2.0  # days of a flat profile that a real one is mixed with
BUSIEST = 1.5  # the gaps know of busy hours already; above 2 it foretold worse than the prior
# Azure's: percentiles of the window, its margin, and when a histogram says nothing.
HEAD, TAIL, MARGIN = 0.05, 0.99, 0.1
MIN_CV, MAX_OUTSIDE, MIN_GAPS = 2.0, 0.5, 4.0
MIN_DAYS, LIKELY = 3.0, 0.5  # a quarter of an hour in which it was called on half of >= 3 days
SCALE = 16  # stored counts are 16 x log2(1 + n), rounded: 4 % apart


class StoredArrivals(Struct, frozen=True, kw_only=True):
    """`Arrivals` as it is stored: counts in a byte each, times by the wall clock."""

    gaps: bytes
    slots: bytes
    days: float
    last_wall_s: float | None = None


@dataclass(slots=True)
class Arrivals:
    """One model's calls. `born` is the `now` it was made at."""

    born: float
    gaps: array[float] = field(default_factory=lambda: array("d", bytes(8 * BINS)))
    slots: array[float] = field(default_factory=lambda: array("d", bytes(8 * SLOTS)))
    days: float = 0.0  # watched, forgotten like the counts
    aged_at: float | None = None  # until when counts and days are aged
    last_at: float | None = None
    last_slot: int | None = None  # days x SLOTS + slot of the last call
    recent: float = 0.0  # calls, each forgotten with RATE_TAU_S

    # ------------------------------------------------------------------------------- learning

    def observe(self, now: float, wall_s: float, count: int = 1) -> None:
        """`count` calls arrived since the last observation. None: nothing happens."""
        if count <= 0:
            return
        self._age(now)
        if self.last_at is not None:
            gap_s = max(0.0, now - self.last_at)
            self._add_gap(gap_s)
            self.recent *= math.exp(-gap_s / RATE_TAU_S)
        if count > 1:
            self._add_gap(0.0)
        self.recent += count
        self.last_at = now if self.last_at is None else max(now, self.last_at)
        slot = math.floor(wall_s / SLOT_S)
        if slot != self.last_slot:
            self.slots[slot % SLOTS] += 1
            self.last_slot = slot

    def _add_gap(self, gap_s: float) -> None:
        index = bisect_right(EDGES, gap_s)
        self.gaps[index] += 1
        if self.gaps[index] > CAP:
            self.gaps[index] /= 2

    def _age(self, now: float) -> None:
        """Forget by half in HALF_LIFE_S, in steps of at least an hour: 160 products a time."""
        since = self.born if self.aged_at is None else self.aged_at
        if now - since < 3600:
            return
        kept, days = self._aged(now)
        for counts in (self.gaps, self.slots):
            for i, n in enumerate(counts):
                counts[i] = n * kept
        self.days, self.aged_at = days, now

    def _aged(self, now: float) -> tuple[float, float]:
        """The share of all counts that is kept by `now`, and the days watched by then."""
        elapsed_s = max(0.0, now - (self.born if self.aged_at is None else self.aged_at))
        kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
        return kept, self.days * kept + (1 - kept) * HALF_LIFE_S / math.log(2) / DAY_S

    # ------------------------------------------------------------------------------- asking

    def idle_s(self, now: float) -> float:
        """Seconds since the last call, or since it was made if there was none."""
        return max(0.0, now - (self.born if self.last_at is None else self.last_at))

    def rate_per_s(self, now: float) -> float:
        """Calls a second of late: each counts 1 / RATE_TAU_S, fading with that time."""
        return self.recent * math.exp(-self.idle_s(now) / RATE_TAU_S) / RATE_TAU_S

    def known(self, now: float) -> bool:
        """Whether at least MIN_GAPS gaps were longer than the present one: history has a say."""
        return self._longer(self.idle_s(now)) * self._aged(now)[0] >= MIN_GAPS

    def chance(self, now: float, wall_s: float, horizon_s: float) -> float:
        """The chance of at least one call within `horizon_s` from now."""
        if not horizon_s > 0:
            return 0.0
        idle_s = self.idle_s(now)
        kept, days = self._aged(now)
        mean = sum(self.slots) * kept / SLOTS
        hazard = begun = 0.0
        until_s = SLOT_S - wall_s % SLOT_S
        slot = math.floor(wall_s / SLOT_S)
        for _ in range(SLOTS):
            ends = self._hazard(idle_s, min(until_s, horizon_s), kept)
            hazard += (ends - begun) * self._busyness(slot, kept, days, mean)
            begun = ends
            if until_s >= horizon_s:
                return -math.expm1(-hazard)
            until_s, slot = until_s + SLOT_S, slot + 1
        return -math.expm1(-hazard - (self._hazard(idle_s, horizon_s, kept) - begun))

    def _hazard(self, idle_s: float, horizon_s: float, kept: float) -> float:
        """-ln(1 - c), whatever the time of day."""
        alive = self._longer(idle_s)
        called = 1 - self._longer(idle_s + horizon_s) / alive if alive > 0 else 0.0
        gaps = alive * kept
        prior = horizon_s / (horizon_s + idle_s)
        chance = (gaps * called + PRIOR_WEIGHT * prior) / (gaps + PRIOR_WEIGHT)
        return -math.log1p(-min(max(chance, 0.0), 1 - 1e-12))

    def _longer(self, gap_s: float) -> float:
        """How many gaps were longer, evenly spread within their bin."""
        index = bisect_right(EDGES, gap_s)
        if index == BINS - 1:
            return self.gaps[index]
        low = EDGES[index - 1] if index else 0.0
        part = (EDGES[index] - gap_s) / (EDGES[index] - low)
        return float(sum(self.gaps[index + 1 :], self.gaps[index] * part))

    def _busyness(self, slot: int, kept: float, days: float, mean: float) -> float:
        """How much likelier a call was in this quarter of an hour than in the mean one."""
        if mean <= 0:
            return 1.0
        relative = self.slots[slot % SLOTS] * kept / mean
        return min(BUSIEST, (days * relative + FLAT_DAYS) / (days + FLAT_DAYS))

    def next_window(self, now: float, wall_s: float) -> tuple[float, float] | None:
        """(earliest, latest) time, by `now`'s clock, at which the next call is expected.

        From the gaps longer than the present one: their 5th and 99th percentile with 10 % margin,
        as in Azure's policy; None where they are not representative: fewer than MIN_GAPS, more than
        half beyond a day, or spread so evenly that the bins' coefficient of variation is below 2.
        Where some quarter of an hour in a longer window had a call on half of the days or more, it
        is that one, since bins of hours are too coarse for a daily job. Without a window it is the
        next such quarter within a day, unless this is one already.
        """
        window = self._window_by_gaps(now)
        if window is not None and window[1] - window[0] <= SLOT_S:
            return window
        return self._likely_slot(now, wall_s, window) or window

    def _window_by_gaps(self, now: float) -> tuple[float, float] | None:
        idle_s, (kept, _) = self.idle_s(now), self._aged(now)
        first = bisect_right(EDGES, idle_s)
        alive = self._longer(idle_s)
        outside = self.gaps[-1]
        if self.last_at is None or alive * kept < MIN_GAPS or outside > MAX_OUTSIDE * alive:
            return None
        bins = [0.0] * first + list(self.gaps[first:])
        mean = sum(bins) / BINS
        if math.sqrt(sum((n - mean) ** 2 for n in bins) / BINS) < MIN_CV * mean:
            return None
        head_s, tail_s = (self._gap_of(alive * (1 - share)) for share in (HEAD, TAIL))
        return (
            max(now, self.last_at + head_s * (1 - MARGIN)),
            max(now, self.last_at + tail_s * (1 + MARGIN)),
        )

    def _gap_of(self, longer: float) -> float:
        """The gap that `longer` gaps exceed."""
        for index in range(BINS - 1, -1, -1):
            here = self.gaps[index]
            if longer <= here and here > 0:
                low = EDGES[index - 1] if index else 0.0
                high = EDGES[index] if index < BINS - 1 else DAY_S
                return high - (high - low) * longer / here
            longer -= here
        return 0.0

    def _likely_slot(
        self, now: float, wall_s: float, within: tuple[float, float] | None
    ) -> tuple[float, float] | None:
        """The first quarter of an hour that begins in `within` and is LIKELY, as times."""
        kept, days = self._aged(now)
        likely = [n * kept >= LIKELY * days for n in self.slots]
        here = math.floor(wall_s / SLOT_S)
        if days < MIN_DAYS or (within is None and likely[here % SLOTS]):
            return None
        earliest, latest = within or (now, now + DAY_S)
        for ahead in range(1, SLOTS + 1):
            begins = now + (here + ahead) * SLOT_S - wall_s
            if begins > latest:
                return None
            if begins >= earliest and likely[(here + ahead) % SLOTS]:
                return begins, begins + SLOT_S
        return None

    # ------------------------------------------------------------------------------- keeping

    def sketch(self, now: float, wall_s: float) -> StoredArrivals:
        """As it is to be stored; `restore` gives back counts within 2.3 %."""
        kept, days = self._aged(now)
        last = None if self.last_at is None else wall_s - self.idle_s(now)
        return StoredArrivals(
            gaps=_pack(self.gaps, kept), slots=_pack(self.slots, kept), days=days, last_wall_s=last
        )


def restore(sketch: StoredArrivals, now: float, wall_s: float) -> Arrivals:
    """What was stored, on this `now`'s clock; time nobody watched ages nothing.

    A last call in the future (clocks differ) is taken as now; bytes of another size count as none.
    """
    made = Arrivals(now)
    for counts, packed in ((made.gaps, sketch.gaps), (made.slots, sketch.slots)):
        if len(packed) == len(counts):
            for i, byte in enumerate(packed):
                counts[i] = 2 ** (byte / SCALE) - 1
    made.days = max(0.0, sketch.days) if math.isfinite(sketch.days) else 0.0
    if sketch.last_wall_s is not None and math.isfinite(sketch.last_wall_s):
        made.last_at = now - max(0.0, wall_s - sketch.last_wall_s)
        made.last_slot = math.floor(sketch.last_wall_s / SLOT_S)
    return made


def _pack(counts: array[float], kept: float) -> bytes:
    return bytes(min(255, round(SCALE * math.log2(1 + n * kept))) for n in counts)
