"""How well `scheduler/signals/forecast.py` foretells a call: against the prior it replaces.

    python bench/forecast.py [--servegen FILE] [--azure FILE] [--quick] [--json]

Each model's calls are replayed second by second, as routers report them; at random times at which
it has been idle for 30 s or more (a model that is called needs no forecast) both are asked for the
chance of a call within 1 min, 10 min and 1 h. The figure is the Brier score: the mean squared
distance to what happened; 0.25 for a coin. The prior is horizon / (horizon + idle).

Models: the 422 clients of ServeGen (14 days; its rate and coefficient of variation of each 600 s,
gaps Gamma within), those with at most 30,000 calls; the Azure functions sample (21 minutes: too
short to learn from, so it shows that little history does no harm); and without files generated
ones: periodic, Poisson, bursty, diurnal and nightly.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.report import Row, print_report
from scheduler.signals.forecast import DAY_S, Arrivals

HORIZONS_S = (60.0, 600.0, 3600.0)
MIN_IDLE_S = 30.0
MAX_CALLS = 30_000
POINTS = 200  # asked a model

Scores = dict[tuple[str, float], list[tuple[float, float, bool]]]  # ours, prior, was there a call


def servegen(path: Path, rng: random.Random) -> Iterator[tuple[str, list[float]]]:
    """(name, times of calls) of each client."""
    windows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            name = f"{row['model']}/{row['client']}"
            windows[name].append(
                (float(row["start_s"]), float(row["rate_rps"]), float(row["cv"] or 1))
            )
    for name, parts in windows.items():
        if sum(rate * 600 for _, rate, _ in parts) > MAX_CALLS:
            continue
        yield name, [t for start, rate, cv in sorted(parts) for t in renewal(rng, start, rate, cv)]


def renewal(rng: random.Random, start: float, rate: float, cv: float) -> list[float]:
    """Calls of one 600 s window: as many as its rate says, with Gamma gaps of that variation."""
    count = int(rate * 600 + rng.random())
    shape = 1 / max(0.1, min(cv, 20)) ** 2
    gaps = [rng.gammavariate(shape, 1) + 1e-9 for _ in range(count + 1)]
    scale, at, times = 600 / sum(gaps), start, []
    for gap in gaps[:-1]:
        at += gap * scale
        times.append(at)
    return times


def azure(path: Path) -> Iterator[tuple[str, list[float]]]:
    calls: dict[str, list[float]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            calls[row["func"]].append(float(row["end_timestamp"]) - float(row["duration"]))
    yield from ((name, sorted(times)) for name, times in calls.items())


def generated(rng: random.Random, days: int = 14) -> Iterator[tuple[str, list[float]]]:
    """Five kinds of model, a few of each, named by kind."""
    end = days * DAY_S
    for period in (120, 600, 3600, 7200):
        yield "periodic", [t + rng.gauss(0, period / 50) for t in range(0, int(end), period)]
    for mean in (120, 600, 3600, 7200):
        yield "poisson", list(until(end, partial(rng.expovariate, 1 / mean)))
        yield "bursty", list(until(end, partial(rng.gammavariate, 1 / 16, 16 * mean)))
    for mean in (60, 300, 900):
        office = until(end, partial(rng.expovariate, 1 / mean))
        yield "diurnal", [t for t in office if 8 <= t % DAY_S / 3600 < 18]
    for hour in (1, 3, 5):
        nightly = (d * DAY_S + hour * 3600 + rng.uniform(0, 600) for d in range(days))
        yield "nightly", [t + i for t in nightly for i in range(50)]


def until(end: float, gap: Callable[[], float]) -> Iterator[float]:
    at = gap()
    while at < end:
        yield at
        at += gap()


def replay(
    kind: str, times: list[float], rng: random.Random, points: int, scores: Scores, warm_s: float
) -> None:
    """Ask at random times after `warm_s` and note the answers in `scores`."""
    if not times:
        return
    times = sorted(times)
    end = max(times[-1], warm_s + 1)
    asks = sorted(rng.uniform(warm_s, end) for _ in range(points))
    model, i = Arrivals(0.0), 0
    for ask in asks:
        while i < len(times) and times[i] <= ask:
            second, count = int(times[i]) + 1.0, 0
            while i < len(times) and times[i] < second:
                i, count = i + 1, count + 1
            model.observe(second, second, count)
        idle_s = model.idle_s(ask)
        if idle_s < MIN_IDLE_S or model.last_at is None:
            continue
        wait_s = times[i] - ask if i < len(times) else float("inf")
        for horizon_s in HORIZONS_S:
            if ask + horizon_s <= end:
                chance = model.chance(ask, ask, horizon_s)
                prior = horizon_s / (horizon_s + idle_s)
                scores[kind, horizon_s].append((chance, prior, wait_s <= horizon_s))


def brier(pairs: Iterable[tuple[float, bool]]) -> float:
    errors = [(chance - came) ** 2 for chance, came in pairs]
    return sum(errors) / len(errors)


def reliability(scores: Scores, horizon_s: float) -> str:
    """Per tenth of the forecast chance: how often a call came. A perfect forecast says its own."""
    bins: dict[int, list[bool]] = defaultdict(list)
    for (_, horizon), points in scores.items():
        if horizon == horizon_s:
            for chance, _, came in points:
                bins[min(9, int(chance * 10))].append(came)
    parts = (f"{b / 10:.1f}+: {sum(v) / len(v):.2f} ({len(v)})" for b, v in sorted(bins.items()))
    return ", ".join(parts)


def rows(scores: Scores) -> list[Row]:
    return [
        Row(
            f"Brier, {kind}, {horizon_s:g} s, {len(points)} points",
            brier((ours, came) for ours, _, came in points),
            brier((prior, came) for _, prior, came in points),
            "prior",
            "<= 1",
        )
        for (kind, horizon_s), points in sorted(scores.items())
        if points
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--servegen", type=Path, help="servegen_client_rates_nonzero.csv.gz")
    parser.add_argument("--azure", type=Path, help="azure_functions_2021_sample198_invitro.csv")
    parser.add_argument("--quick", action="store_true", help="a tenth of the questions")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng, points = random.Random(7), POINTS // 10 if options.quick else POINTS
    scores: Scores = defaultdict(list)
    for kind, times in generated(rng):
        replay(kind, times, rng, points, scores, 2 * DAY_S)
    if options.servegen:
        for _, times in servegen(options.servegen, rng):
            replay("ServeGen", times, rng, points, scores, DAY_S)
    if options.azure:
        for _, times in azure(options.azure):
            replay("Azure functions", times, rng, points, scores, 0.0)
    print_report("bench/forecast.py", rows(scores), options.json)
    if not options.json:
        for horizon_s in HORIZONS_S:
            print(f"came, by forecast chance, {horizon_s:g} s: {reliability(scores, horizon_s)}")


if __name__ == "__main__":
    main()
