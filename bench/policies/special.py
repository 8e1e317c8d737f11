"""Workloads made for one question each: `drawn(name)`. Pure.

shifted      60 models, popularity by Zipf 1 that is dealt again every 10 minutes
arena-4      three busy models and 24 others, 2.5 calls a second, on 4 GPUs (arena-6, -8: on 6, 8):
             more is called at once than the devices hold
arena-tp4    the same with a model that needs all four GPUs, called now and then
tunes-C-P    80 models on 8 GPUs of which P % are tunes of three bases (P 0, 30, 60, 90; C 0, 1, 2:
             how they are called); the arrivals of a C are the same for every P
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from bench.policies import workloads as w
from bench.policies.family import DURATION_S, WARM_S, Calling, Drawn, arrivals
from scheduler.sim.traces import Arrival, Workload

TUNES = {  # rate, host GiB, calling
    0: (0.5, 512, Calling(0.9, 2.0, None, None, 0, "chat", 5, 20, 800, 200)),
    1: (0.35, 384, Calling(0.6, 1.2, None, 300.0, 0, "single", 5, 20, 800, 200)),
    2: (0.8, 768, Calling(1.1, 4.0, None, None, 0, "chat", 5, 20, 800, 200)),
}
PERCENT = (0, 30, 60, 90)
ARENA_GPUS = (4, 6, 8)
NAMES = (
    "shifted", *(f"arena-{gpus}" for gpus in ARENA_GPUS), "arena-tp4",
    *(f"tunes-{case}-{percent}" for case in TUNES for percent in PERCENT),
)  # fmt: skip


def drawn(name: str) -> Drawn:
    """A workload of NAMES."""
    kind, *which = name.split("-")
    if kind == "shifted":
        return _shifted()
    if kind == "tunes":
        return _tunes(int(which[0]), int(which[1]))
    return _arena_tp4() if which == ["tp4"] else _arena(name, int(which[0]), "arena 1")


def _shifted() -> Drawn:
    random = Random("shifted 1")
    names = [f"m{i:02d}" for i in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    found = []
    for part in range(5):
        random.shuffle(names)
        at = part * 600.0
        while (at := at + random.expovariate(0.6)) < (part + 1) * 600.0:
            found.append(Arrival(at, random.choices(names, weights)[0], 800, 200))
    return _on_one_node("shifted", names, found, 600.0, 3000.0, 8, random)


def _arena(name: str, gpus: int, seed: str) -> Drawn:
    random = Random(seed)
    names = [f"a{i:02d}" for i in range(27)]
    weights = [1 / 6] * 3 + [0.5 / 24 * 2 * (24 - i) / 25 for i in range(24)]
    found, at = [], 0.0
    while (at := at + random.expovariate(2.5)) < 600.0:
        found.append(Arrival(at, random.choices(names, weights)[0], 800, 250))
    return _on_one_node(name, names, found, 150.0, 600.0, gpus, random)


def _arena_tp4() -> Drawn:
    one = _arena("arena-tp4", 4, "arena 4")
    small = ((1.5, 1), (3.0, 1), (8.0, 1), (8.0, 1), (14.0, 1))
    sizes = tuple((8.0, 1) if i < 3 else (70.0, 4) if i == 8 else small[i % 5] for i in range(27))
    return replace(one, case=replace(one.case, sizes=sizes))


def _on_one_node(
    name: str, names: list[str], found: list[Arrival], warm_s: float, duration_s: float, gpus: int,
    random: Random,
) -> Drawn:  # fmt: skip
    models = tuple(sorted(names))
    workload = Workload(models, tuple(sorted(found)), duration_s)
    one = w.Case(name, gpus, workload, warm_s, w.dealt(len(models), random), 1)
    own = tuple(f"own{i}" for i in range(len(models)))
    return Drawn(name, one, w.NODE_GPUS, 1024, "none", own, _told(one, 1024, "none"))


def _tunes(case: int, percent: int) -> Drawn:
    random = Random(f"tunes {case}")
    billions = [8.0] * 48 + [3.0] * 20 + [14.0] * 12
    random.shuffle(billions)
    names = tuple(f"m{i:03d}" for i in range(80))
    rate, host_gib, calling = TUNES[case]
    calls = arrivals(calling, names, rate, DURATION_S, Random(f"tunes {case} calls"))
    workload = Workload(names, calls, DURATION_S)
    name = f"tunes-{case}-{percent}"
    one = w.Case(name, 8, workload, WARM_S, tuple((b, 1) for b in billions), 1)
    tuned = set(random.sample(range(80), 80 * percent // 100))
    architectures = tuple(f"a{billions[i]:g}" if i in tuned else f"own{i}" for i in range(80))
    traits = _told(one, host_gib, "all")
    return Drawn(name, one, w.NODE_GPUS, host_gib, "all", architectures, traits)


def _told(one: w.Case, host_gib: int, on_disk: str) -> dict[str, object]:
    return {
        "models": len(one.sizes), "gpus": one.gpus, "node": w.NODE_GPUS, "host": host_gib,
        "mix": one.name, "ws": round(w.working_set(one, 60.0), 2),
        "requests": len(one.workload.arrivals), "disk": on_disk,
    }  # fmt: skip
