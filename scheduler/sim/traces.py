"""Who asks for what, and when: traces and generators in one form. Pure, given lines of text.

Rules this file keeps:
- every draw comes from the `Random` that is handed in, in a fixed order: one seed, one workload;
- times are seconds from the beginning of the part that is taken; arrivals are in order;
- a scale multiplies the rate by thinning or by stretching gaps, never by copying requests.

How one-service traces become many models: a *burst* (requests less than BURST_GAP_S apart) goes
to one model, drawn by popularity, so that the burstiness of the trace stays within a model.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import NamedTuple

from scheduler.signals.forecast import DAY_S

BURST_GAP_S = 1.0
RATE_WINDOW_S = 600.0  # of ServeGen's rates
CHAT = (1024, 256)  # tokens of prompt and answer where a trace has none: an assumption


class Arrival(NamedTuple):
    """One request. `patience_s`: when its caller hangs up; None: never."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    patience_s: float | None = None


@dataclass(frozen=True)
class Workload:
    """Arrivals and the models they name."""

    models: tuple[str, ...]
    arrivals: tuple[Arrival, ...]
    duration_s: float


class Call(NamedTuple):
    """One request of a service that is not split into models yet."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


# ------------------------------------------------------------------------------ readers


def azure_llm(lines: Iterable[str]) -> list[Call]:
    """TIMESTAMP,ContextTokens,GeneratedTokens of Azure's LLM inference trace 2023.

    Raises ValueError naming the line that cannot be read.
    """
    calls, start = [], None
    for number, row in _rows(lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            # Seven digits of a second; Python reads six.
            at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
            start = start or at
            seconds = (at - start).total_seconds()
            tokens = int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))
            calls.append(Call(seconds, *tokens))
        except ValueError as error:
            raise ValueError(f"line {number} is not a row of an Azure LLM trace: {error}") from None
    return sorted(calls)


def mooncake(lines: Iterable[str]) -> list[Call]:
    """{"timestamp": ms, "input_length", "output_length"} a line. Raises ValueError as above."""
    calls = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tokens = int(row["input_length"]), max(1, int(row["output_length"]))
            calls.append(Call(row["timestamp"] / 1000, *tokens))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is not a row of a Mooncake trace: {error!r}") from None
    return sorted(calls)


def azure_functions(lines: Iterable[str]) -> dict[str, list[float]]:
    """func -> times of its calls (end_timestamp - duration), in order."""
    found: dict[str, list[float]] = {}
    for number, row in _rows(lines, ("app", "func", "end_timestamp", "duration")):
        try:
            at = float(row["end_timestamp"]) - float(row["duration"])
        except ValueError as error:
            raise ValueError(f"line {number} is not a row of a functions trace: {error}") from None
        found.setdefault(row["func"], []).append(max(0.0, at))
    return {name: sorted(times) for name, times in found.items()}


class Rate(NamedTuple):
    """One client's arrivals in one window of ServeGen."""

    client: str
    start_s: float
    rate: float
    dist: str
    shape: float


def servegen(lines: Iterable[str], from_s: float, duration_s: float) -> list[Rate]:
    """model,client,start_s,rate_rps,cv,dist,p1,p2; only the windows that begin in the part asked
    for. `shape` is p1, of a Gamma or a Weibull distribution of the gaps."""
    found = []
    columns = ("model", "client", "start_s", "rate_rps", "dist", "p1")
    for number, row in _rows(lines, columns):
        try:
            start_s = float(row["start_s"])
            if not from_s - RATE_WINDOW_S < start_s < from_s + duration_s:
                continue
            rate, shape = float(row["rate_rps"]), float(row["p1"])
        except ValueError as error:
            raise ValueError(f"line {number} is not a row of ServeGen's rates: {error}") from None
        if row["dist"] not in ("Gamma", "Weibull"):
            raise ValueError(f"line {number}: dist is {row['dist']!r}, not Gamma or Weibull")
        client = f"{row['model']}-{row['client']}"
        found.append(Rate(client, start_s - from_s, rate, row["dist"], shape))
    return found


def _rows(lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(lines)
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"the trace has no column {missing[0]!r}; it has {reader.fieldnames}")
    yield from enumerate(reader, 2)


# ------------------------------------------------------------------------------ workloads

Tokens = Callable[[Random], tuple[int, int]]  # of prompt and answer


def tokens_of(calls: Sequence[Call]) -> Tokens:
    """Lengths drawn from a trace, prompt and answer of one request together."""
    return lambda random: random.choice(calls)[1:]


def lognormal_tokens(random: Random) -> tuple[int, int]:
    """Median CHAT tokens, sigma 0.8: an assumption."""
    prompt, output = CHAT
    return (
        max(1, int(prompt * random.lognormvariate(0, 0.8))),
        max(1, int(output * random.lognormvariate(0, 0.8))),
    )


def popularity(models: int, exponent: float) -> list[float]:
    """Shares by a power law: model i gets (i + 1) ** -exponent of the whole.

    Worked example: 3 models, exponent 1: 1, 1/2, 1/3 -> 0.545, 0.273, 0.182.
    """
    weights = [(i + 1) ** -exponent for i in range(models)]
    return [w / sum(weights) for w in weights]


def split_bursts(
    calls: Sequence[Call], models: int, random: Random, *, duration_s: float, exponent: float = 1.0,
    rate_scale: float = 1.0, from_s: float = 0.0,
) -> Workload:  # fmt: skip
    """A one-service trace for many models (see the top). A rate below 1 drops whole bursts."""
    names = _names(models)
    shares = popularity(models, exponent)
    arrivals: list[Arrival] = []
    last, model, kept = -math.inf, names[0], True
    stretch = 1.0 / rate_scale if rate_scale > 1 else 1.0  # more than there is: quicker
    for at_s, prompt, output in calls:
        if at_s - last > BURST_GAP_S:
            model = random.choices(names, shares)[0]
            kept = random.random() < rate_scale
        last = at_s
        when = (at_s - from_s) * stretch
        if kept and 0 <= when < duration_s:
            arrivals.append(Arrival(when, model, prompt, output))
    return Workload(names, tuple(arrivals), duration_s)


def from_functions(
    calls: dict[str, list[float]], models: int, random: Random, *, duration_s: float,
    tokens: Tokens = lognormal_tokens, rate_scale: float = 1.0,
) -> Workload:  # fmt: skip
    """Each function a model; for more models than functions the patterns are taken again, turned
    by a random phase. A trace shorter than the run begins again."""
    names = _names(models)
    patterns = [calls[name] for name in sorted(calls, key=lambda n: (-len(calls[n]), n))]
    period = max(times[-1] for times in patterns) + BURST_GAP_S
    arrivals = []
    for index, name in enumerate(names):
        phase = random.uniform(0, period) if index >= len(patterns) else 0.0
        for base in patterns[index % len(patterns)]:
            at_s = (base + phase) % period
            while at_s < duration_s:
                if random.random() < rate_scale:
                    arrivals.append(Arrival(at_s, name, *tokens(random)))
                at_s += period
    return Workload(names, tuple(sorted(arrivals)), duration_s)


def from_servegen(
    rates: Sequence[Rate], random: Random, *, duration_s: float, rate_scale: float = 1.0,
    models: int | None = None, tokens: Tokens = lognormal_tokens,
) -> Workload:  # fmt: skip
    """Each client a model, its gaps drawn again in each window; `models`: the busiest ones only."""
    volume: dict[str, float] = {}
    for rate in rates:
        volume[rate.client] = volume.get(rate.client, 0.0) + rate.rate
    busiest = sorted(volume, key=lambda c: (-volume[c], c))[:models]
    kept = set(busiest)
    streams = (
        _renewal(
            rate.client, random, max(0.0, rate.start_s),
            min(duration_s, rate.start_s + RATE_WINDOW_S),
            rate.rate * rate_scale, _gaps(rate.dist, rate.shape), tokens,
        )
        for rate in rates
        if rate.client in kept
    )  # fmt: skip
    arrivals = sorted(arrival for stream in streams for arrival in stream)
    return Workload(tuple(busiest), tuple(arrivals), duration_s)


def generate(
    models: int, rate: float, random: Random, *, duration_s: float, cv: float = 1.0,
    exponent: float = 1.0, diurnal: float = 0.0, day_s: float = DAY_S,
    tokens: Tokens = lognormal_tokens,
) -> Workload:  # fmt: skip
    """`rate` requests a second over all models, by power-law popularity.

    Gaps of each model are Gamma distributed with that coefficient of variation (1: Poisson).
    `diurnal` d thins the day's trough: at phase x of a day a request is kept with probability
    1 - d x (1 + cos(2 pi (x + own phase))) / 2; each model's day begins at its own time.
    """
    names = _names(models)
    shape = 1 / (cv * cv)
    arrivals = []
    for name, share in zip(names, popularity(models, exponent), strict=True):
        own = random.random()
        stream = _renewal(
            name, random, 0.0, duration_s, rate * share, _gaps("Gamma", shape), tokens
        )
        for arrival in stream:
            turn = 2 * math.pi * (arrival.at_s / day_s + own)
            if not diurnal or random.random() >= diurnal * (1 + math.cos(turn)) / 2:
                arrivals.append(arrival)
    return Workload(names, tuple(sorted(arrivals)), duration_s)


def merge(*workloads: Workload) -> Workload:
    """All of them at once."""
    models = tuple(dict.fromkeys(name for w in workloads for name in w.models))
    arrivals = tuple(heapq.merge(*(w.arrivals for w in workloads)))
    return Workload(models, arrivals, max(w.duration_s for w in workloads))


Gap = Callable[[Random], float]  # with mean 1


def _gaps(dist: str, shape: float) -> Gap:
    if dist == "Weibull":
        scale = 1 / math.gamma(1 + 1 / shape)
        return lambda random: random.weibullvariate(scale, shape)
    return lambda random: random.gammavariate(shape, 1 / shape)


def _renewal(
    model: str, random: Random, from_s: float, to_s: float, rate: float, gap: Gap, tokens: Tokens
) -> Iterator[Arrival]:  # fmt: skip
    if rate <= 0:
        return
    # The first gap began before the window: a part of it is over.
    at_s = from_s + random.random() * gap(random) / rate
    while at_s < to_s:
        yield Arrival(at_s, model, *tokens(random))
        at_s += gap(random) / rate


def _names(models: int) -> tuple[str, ...]:
    width = len(str(max(0, models - 1)))
    return tuple(f"m{i:0{width}d}" for i in range(models))
