"""A family of random workloads: `draw(seed)` gives one, the same each time. Pure.

Drawn by seed: 10 to 300 models, 2 to 32 GPUs in nodes of 2, 4 or 8, 256 GiB to 1.5 TiB of host
memory a node, one of six mixes of sizes (two of them mostly fine-tunes of one or three base
architectures), popularity by Zipf 0.5 to 1.5, and how it is called (`Calling`).

The load is drawn too: models called within 60 s want 35 to 200 % of the device memory
(`workloads.working_set`). The rate of calls that gives this is found by bisection; it is MOST_RATE
at most, and enough that LEAST_CALLS are measured. WARM_S warm up, then MEASURED_S count.

Rules this file keeps: the order and number of random draws never change, or every seed would name
another workload and no figure could be compared with an older one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from bench.policies import workloads as w
from runtime.sizes import GIB
from scheduler.sim.traces import Arrival, Workload

WARM_S, MEASURED_S = 240.0, 720.0
DURATION_S = WARM_S + MEASURED_S
KEEP_S = 60.0  # the load counts models that were called within so long
LEAST_RATE, MOST_RATE = 0.01, 3.0  # calls a second
LEAST_CALLS = 60  # measured; with fewer a mean says nothing
MOST_GPUS = 32
STEPS = 9  # of the bisection


@dataclass(frozen=True)
class Share:
    """One size in a mix. `architecture`: of the base that these are tunes of; None: their own."""

    billions: float
    share: float
    devices: int = 1  # that a replica spans
    architecture: str | None = None


MIXES: dict[str, tuple[Share, ...]] = {
    "mix": tuple(Share(*one) for one in w.MIX),
    "small": (Share(0.5, 0.2), Share(1.5, 0.3), Share(3.0, 0.3), Share(8.0, 0.2)),
    "tunes1": (Share(8.0, 0.75, 1, "a8"), Share(1.5, 0.1), Share(14.0, 0.1), Share(32.0, 0.05)),
    "tunes3": (
        Share(8.0, 0.4, 1, "a8"), Share(3.0, 0.2, 1, "a3"), Share(14.0, 0.2, 1, "a14"),
        Share(8.0, 0.1), Share(32.0, 0.08), Share(70.0, 0.02, 4),
    ),
    "large": (Share(8.0, 0.3), Share(14.0, 0.3), Share(32.0, 0.3), Share(70.0, 0.1, 4)),
    "bimodal": (Share(1.5, 0.6), Share(3.0, 0.2), Share(32.0, 0.1), Share(70.0, 0.1, 4)),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One workload on one cluster."""

    name: str
    case: w.Case
    node_gpus: int
    host_gib: int  # of memory a node
    on_disk: Literal["all", "none"]  # whose files are on every node at first
    architectures: tuple[str, ...]  # by model
    traits: dict[str, object] = field(default_factory=dict)  # what it is like, to print


@dataclass(frozen=True)
class Calling:
    """How a workload's models are called.

    Each model is a renewal process of its own, so that bursts are one model's and not only the
    cluster's: Gamma gaps with coefficient of variation `cv`, of calls or of whole sessions.
    """

    zipf: float
    cv: float
    day: tuple[float, float] | None  # (the share lost in the trough, seconds a day)
    shift_s: float | None  # popularity is dealt again so often
    bursts: int  # of 5 to 30 calls within 15 s, each on one model
    kind: str  # "single" calls, "chat" with one model, or "agents" that call two or three by turns
    calls: float  # a session's
    think_s: float  # between two calls of a session
    prompt: int  # tokens, the median
    output: int

    @property
    def session_calls(self) -> float:
        """Calls that one draw of a gap brings."""
        return 1.0 if self.kind == "single" else self.calls


@dataclass(frozen=True)
class _Traits:
    """What is drawn first, before sizes and arrivals."""

    node_gpus: int
    count: int
    mix: str
    over: float  # bytes of all models / bytes of all devices
    host_gib: int
    calling: Calling
    load: float
    on_disk: Literal["all", "none"]


def draw(seed: int) -> Drawn:
    """The workload of a seed."""
    random = Random(f"family {seed}")
    traits = _draw_traits(random)
    names = tuple(f"m{i:03d}" for i in range(traits.count))
    node_gpus, gpus, sizes, architectures = _cluster(traits, names, random)

    def at_rate(rate: float) -> w.Case:
        calls = arrivals(traits.calling, names, rate, DURATION_S, Random(f"family {seed} calls"))
        return w.Case(f"f{seed}", gpus, Workload(names, calls, DURATION_S), WARM_S, sizes, 1)

    case = _loaded(at_rate, traits.load)
    return Drawn(
        case.name, case, node_gpus, traits.host_gib, traits.on_disk, architectures,
        _told(traits, case, node_gpus),
    )  # fmt: skip


def _draw_traits(r: Random) -> _Traits:
    node_gpus = r.choice([2, 4, 8, 8])
    count = round(_log_uniform(r, 10, 300))
    mix = r.choice(list(MIXES))
    over = _log_uniform(r, 1.4, 8)
    host_gib = r.choice([256, 384, 512, 768, 1024, 1536])
    zipf = r.uniform(0.5, 1.5)
    cv = _log_uniform(r, 1, 8)
    day = (r.uniform(0.5, 0.9), r.uniform(600, 1800)) if r.random() < 0.4 else None
    shift_s = r.uniform(200, 600) if r.random() < 0.4 else None
    bursts = r.randint(2, 10) if r.random() < 0.4 else 0
    kind = r.choices(["single", "chat", "agents"], [0.45, 0.35, 0.2])[0]
    calls, think_s = r.uniform(3, 12), r.uniform(5, 40)
    prompt, output = r.choice([300, 800, 2000]), r.choice([100, 200, 400])
    load = _log_uniform(r, 0.35, 2.0)
    on_disk: Literal["all", "none"] = "all" if r.random() < 0.7 else "none"
    calling = Calling(zipf, cv, day, shift_s, bursts, kind, calls, think_s, prompt, output)
    return _Traits(node_gpus, count, mix, over, host_gib, calling, load, on_disk)


def _log_uniform(r: Random, low: float, high: float) -> float:
    return math.exp(r.uniform(math.log(low), math.log(high)))


def _cluster(
    traits: _Traits, names: tuple[str, ...], r: Random
) -> tuple[int, int, tuple[tuple[float, int], ...], tuple[str, ...]]:
    """(GPUs a node, GPUs in whole nodes, sizes, architectures): as many GPUs as `over` says.

    Nodes are halved where one would have a third more than all the GPUs that are wanted.
    """
    node_gpus = traits.node_gpus
    sizes, architectures = _dealt(MIXES[traits.mix], traits.count, node_gpus, r)
    while node_gpus > 2 and _wanted_gpus(names, sizes, traits.over) < 0.75 * node_gpus:
        node_gpus //= 2
        sizes, architectures = _dealt(MIXES[traits.mix], traits.count, node_gpus, r)
    gpus = max(2, min(MOST_GPUS, round(_wanted_gpus(names, sizes, traits.over))))
    whole = min(MOST_GPUS, -(-gpus // node_gpus) * node_gpus)
    return node_gpus, whole, sizes, architectures


def _wanted_gpus(
    names: tuple[str, ...], sizes: tuple[tuple[float, int], ...], over: float
) -> float:
    return sum(map(w.replica_bytes, names, sizes)) / over / w.GPU_BYTES


def _dealt(
    mix: tuple[Share, ...], count: int, node_gpus: int, r: Random
) -> tuple[tuple[tuple[float, int], ...], tuple[str, ...]]:
    """A size and an architecture for each model; what spans more than a node is 32B instead."""
    dealt = [one for one in mix for _ in range(round(one.share * count))]
    dealt = (dealt + [mix[0]] * count)[:count]
    dealt = [one if one.devices <= node_gpus else Share(32.0, one.share) for one in dealt]
    r.shuffle(dealt)
    architectures = tuple(one.architecture or f"own{i}" for i, one in enumerate(dealt))
    return tuple((one.billions, one.devices) for one in dealt), architectures


def _loaded(at_rate: Callable[[float], w.Case], load: float) -> w.Case:
    """The case whose working set is `load`, or the nearest that the bounds on the rate allow."""
    low, high = LEAST_RATE, MOST_RATE
    case = at_rate(high)
    if w.working_set(case, KEEP_S) > load:
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            case = at_rate(middle)
            low, high = (low, middle) if w.working_set(case, KEEP_S) > load else (middle, high)
    while sum(a.at_s >= WARM_S for a in case.workload.arrivals) < LEAST_CALLS:
        high *= 1.3
        case = at_rate(high)
    return case


def _told(traits: _Traits, case: w.Case, node_gpus: int) -> dict[str, object]:
    calling = traits.calling
    total = sum(map(w.replica_bytes, case.workload.models, case.sizes))
    weights = sum(2e9 * billions for billions, _ in case.sizes)
    return {
        "models": traits.count, "gpus": case.gpus, "node": node_gpus, "host": traits.host_gib,
        "mix": traits.mix, "over": round(total / case.gpus / w.GPU_BYTES, 1),
        "zipf": round(calling.zipf, 2), "cv": round(calling.cv, 1), "day": bool(calling.day),
        "shift": round(calling.shift_s or 0), "bursts": calling.bursts, "kind": calling.kind,
        "ws": round(w.working_set(case, KEEP_S), 2), "requests": len(case.workload.arrivals),
        "disk": traits.on_disk,
        "hostshare": round(weights / (case.gpus / node_gpus * traits.host_gib * GIB), 2),
    }  # fmt: skip


# ------------------------------------------------------------------------------- arrivals


def arrivals(
    calling: Calling, names: tuple[str, ...], rate: float, duration_s: float, r: Random
) -> tuple[Arrival, ...]:
    """Calls at `rate` a second in all, in order of time."""
    order = list(names)
    r.shuffle(order)
    weights = [(i + 1) ** -calling.zipf for i in range(len(names))]
    total = sum(weights)
    found: list[Arrival] = []
    for rank, weight in enumerate(weights):
        own_rate = rate / calling.session_calls * weight / total
        for at in _begins(calling, own_rate, duration_s, r):
            found += _session(calling, order, rank, at, duration_s, r)
    for _ in range(calling.bursts):
        at, name = r.uniform(0, duration_s), r.choice(order)
        for _ in range(r.randint(5, 30)):
            found.append(Arrival(at + r.uniform(0, 15), name, *_tokens(calling, r)))
    return tuple(sorted(one for one in found if one.at_s < duration_s))


def _begins(calling: Calling, rate: float, duration_s: float, r: Random) -> Iterator[float]:
    """When calls, or sessions, of one model begin; the trough of a day leaves some out.

    Its caller draws from `r` too, between two of these.
    """
    shape = 1 / calling.cv**2
    at = r.random() / rate * r.random()
    while at < duration_s:
        if calling.day is None or r.random() < _daylight(calling.day, at):
            yield at
        at += r.gammavariate(shape, 1 / rate / shape)


def _daylight(day: tuple[float, float], at: float) -> float:
    lost, day_s = day
    return 1 - lost * (0.5 + 0.5 * math.sin(2 * math.pi * at / day_s))


def _session(
    calling: Calling, order: list[str], rank: int, at: float, duration_s: float, r: Random
) -> list[Arrival]:
    """One call, or a session of several, of who is at `rank` of popularity when it begins."""
    name = order[_place(calling, rank, at, len(order))]
    if calling.kind == "single":
        return [Arrival(at, name, *_tokens(calling, r))]
    count = 1 + int(r.expovariate(1 / max(0.5, calling.calls - 1)))
    team = [name]
    if calling.kind == "agents":
        team += [r.choice(order) for _ in range(r.randint(1, 2))]
    made = []
    for i in range(count):
        made.append(Arrival(at, team[i % len(team)], *_tokens(calling, r)))
        at += r.expovariate(1 / calling.think_s)
        if at >= duration_s:
            break
    return made


def _place(calling: Calling, rank: int, at: float, count: int) -> int:
    """Where in the order who has `rank` now stands: elsewhere after each shift."""
    part = int(at // calling.shift_s) if calling.shift_s else 0
    return (rank * (7 + 2 * part) + 11 * part) % count if part else rank


def _tokens(calling: Calling, r: Random) -> tuple[int, int]:
    prompt = max(1, int(calling.prompt * r.lognormvariate(0, 0.8)))
    return prompt, max(1, int(calling.output * r.lognormvariate(0, 0.6)))
