"""The four workloads of bench/policy.py, the same for every policy.

Sizes: MIX below (parameters, share, tensor parallel), dealt out exactly and shuffled by the seed,
so no size goes with popularity. What a size books is scheduler/sim/catalog.py's rule. Weights are
in the shared store; a node's disk has none at the start and keeps what it pulled, by LRU.

servegen   ServeGen's clients that call at all in its 14 days (421), each a model, on 32 GPUs (4
           nodes). In any hour only about 150 of them call; so each begins in a window of its own,
           drawn from those with calls, and goes on from there: its rate in each 600 s and its
           distribution of gaps, all rates times one factor that makes 1.2 requests a second of
           them. Lengths: Azure's conversation trace.
functions  Azure's functions sample: 199 calls of 31 functions in 20 min (not 198 functions; the
           file's name counts its rows). 198 models on 16 GPUs (2 nodes): model i has the pattern of
           function i mod 31, the repeats turned by a random phase, seven calls in ten dropped;
           after 20 min it begins again, so the second round resembles the first, which flatters
           forecasts (an ablation has none). Lengths as above.
bursts     Azure's code trace (57 min, its own lengths), each burst to one of 20 models by a power
           law with exponent 1, on 4 GPUs (1 node), at its own rate.
powerlaw   generated: 1,000 models on 64 GPUs (8 nodes), 3 requests a second by a power law with
           exponent 1, gaps Gamma with a coefficient of variation of 2, a day of one hour whose
           trough loses 80 %; lengths lognormal.

Each run has a part that warms up and is not measured: disks fill, histories begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from runtime.sizes import GIB
from scheduler.sim import trace_files, traces
from scheduler.sim.catalog import sized
from scheduler.sim.traces import Rate, Workload
from scheduler.state.messages import StoredModel

# Billions of parameters, share of models, devices a replica spans: an assumption, most are 7-8B.
MIX = ((1.5, 0.15, 1), (3.0, 0.15, 1), (8.0, 0.46, 1), (14.0, 0.15, 1), (32.0, 0.07, 1),
       (70.0, 0.02, 4))  # fmt: skip
CONV, CODE = "AzureLLMInferenceTrace_conv_2023.csv", "AzureLLMInferenceTrace_code_2023.csv"
FUNCTIONS = "azure_functions_2021_sample198_invitro.csv"
SERVEGEN = "servegen_client_rates_nonzero.csv.gz"
NODE_GPUS, GPU_BYTES = 8, 80 * GIB


@dataclass(frozen=True)
class Case:
    """One workload on one cluster. `warm_s`: from when on requests count."""

    name: str
    gpus: int
    workload: Workload
    warm_s: float
    sizes: tuple[tuple[float, int], ...]  # by model: billions, tensor parallel
    max_replicas: int = 1  # where no model is called so often that it needs two


def case(name: str, folder: Path, seed: int, quick: bool) -> Case:
    """A workload by name. Raises OSError where its trace is not in `folder`."""
    random = Random(f"{name} {seed}")
    warm_s, measured_s = (300.0, 300.0) if quick else (1200.0, 1800.0)
    if name == "powerlaw" and not quick:
        warm_s, measured_s = 300.0, 600.0
    duration_s = warm_s + measured_s
    match name:
        case "servegen":
            workload = _servegen(folder, random, duration_s, quick)
            gpus = 8 if quick else 32
        case "functions":
            workload = trace_files.load(
                folder / FUNCTIONS, "azure-functions", random, duration_s=duration_s,
                models=98 if quick else 198, lengths=folder / CONV,
                rate_scale=0.3,
            )  # fmt: skip
            gpus = 8 if quick else 16
        case "bursts":
            workload = trace_files.load(
                folder / CODE, "azure-llm", random, duration_s=duration_s, models=20
            )
            gpus = 4
        case "powerlaw":
            workload = traces.generate(
                120 if quick else 1000, 0.4 if quick else 3.0, random, duration_s=duration_s,
                cv=2.0, diurnal=0.8, day_s=3600.0,
            )  # fmt: skip
            gpus = 8 if quick else 64
        case _:
            raise ValueError(f"there is no workload {name!r}; use {', '.join(NAMES)}")
    sizes = dealt(len(workload.models), random)
    return Case(name, gpus, workload, warm_s, sizes, 2 if name == "bursts" else 1)


def _servegen(folder: Path, random: Random, duration_s: float, quick: bool) -> Workload:
    with trace_files.opened(folder / SERVEGEN) as file:
        rates = traces.servegen(file, 0.0, 14 * 86400.0)
    with trace_files.opened(folder / CONV) as file:
        tokens = traces.tokens_of(traces.azure_llm(file))
    of: dict[str, dict[float, Rate]] = {}
    for rate in rates:
        of.setdefault(rate.client, {})[rate.start_s] = rate
    clients = sorted(of)
    if quick:
        clients = random.sample(clients, 100)
    windows = math.ceil(duration_s / traces.RATE_WINDOW_S)
    turned = []
    for client in clients:
        begins = random.choice(sorted(of[client]))
        for i in range(windows):
            found = of[client].get(begins + i * traces.RATE_WINDOW_S)
            if found is not None:
                turned.append(found._replace(start_s=i * traces.RATE_WINDOW_S))
    total = sum(rate.rate for rate in turned) / windows
    wanted = 0.6 if quick else 1.2
    return traces.from_servegen(
        turned, random, duration_s=duration_s, rate_scale=wanted / total, tokens=tokens
    )


NAMES = ("servegen", "functions", "bursts", "powerlaw")


def dealt(count: int, random: Random) -> tuple[tuple[float, int], ...]:
    """A size for each of `count` models, as close to MIX as whole models come."""
    sizes = [(b, tp) for b, share, tp in MIX for _ in range(round(share * count))]
    sizes = (sizes + [(8.0, 1)] * count)[:count]
    random.shuffle(sizes)
    return tuple(sizes)


def models(one: Case, **spec: object) -> list[StoredModel]:
    """The models of a case; `spec`: further fields of their specs."""
    return [
        sized(name, billions, tp, **spec)
        for name, (billions, tp) in zip(one.workload.models, one.sizes, strict=True)
    ]


def replica_bytes(name: str, size: tuple[float, int]) -> int:
    """Bytes that a replica of that size books, on all its devices together."""
    stored = sized(name, *size)
    return stored.effective().booked_bytes() * size[1]


def packed(one: Case) -> int:
    """GPUs, in whole nodes, that hold one replica of every model: first fit, the largest first."""
    nodes: list[list[int]] = []
    stored = sorted(
        models(one), key=lambda s: -s.effective().booked_bytes() * s.spec.tensor_parallel_size
    )
    for model in stored:
        spec = model.effective()
        need, count = spec.booked_bytes(), spec.tensor_parallel_size
        for rooms in nodes:
            if _put(rooms, need, count):
                break
        else:
            nodes.append([GPU_BYTES] * NODE_GPUS)
            _put(nodes[-1], need, count)
    return len(nodes) * NODE_GPUS


def _put(rooms: list[int], need: int, count: int) -> bool:
    fitting = [i for i, room in enumerate(rooms) if room >= need][:count]
    if len(fitting) < count:
        return False
    for i in fitting:
        rooms[i] -= need
    return True


def working_set(one: Case, keep_s: float) -> float:
    """The share of the cluster's device memory that models called within `keep_s` would take, by
    time: what it is offered. Worked example: one model of 40 GiB, called once in 600 s, kept for 60
    s, on one GPU of 80 GiB: 60 x 40 / (600 x 80) = 0.05."""
    size = dict(
        zip(one.workload.models, map(replica_bytes, one.workload.models, one.sizes), strict=True)
    )
    until: dict[str, float] = {}
    total = 0.0
    for arrival in one.workload.arrivals:
        begins = max(arrival.at_s, until.get(arrival.model, 0.0))
        until[arrival.model] = arrival.at_s + keep_s
        total += (until[arrival.model] - begins) * size[arrival.model]
    return total / (one.gpus * GPU_BYTES * one.workload.duration_s)
