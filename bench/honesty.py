"""How well the simulator foretells a live cluster: the same calls, live and in virtual time.

    python bench/honesty.py [--quick] [--json] [--engine stub vllm]

Live: `stoker up` with one device that holds two of three models, first with the stub engine, then
with real vLLM on CPU (tiny models). Each model is called a few times by itself, which fills the
footprint ledger and shows the time to first token of a hot call. Then a seeded sequence of calls
(exponential gaps, popularity 5 : 3 : 2) is played, and each call's time to first token is taken.

Simulated: the production scheduler, agent core and router admission in virtual time, with the
ledger that the live scheduler measured *before* that sequence, the hot time to first token of then,
and the same calls at the same times. p50 and p95 are compared; the target is an error below 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from msgspec.structs import replace

from bench.lib.real_engine import Stoker, boot_s, first_token, stoker_up, wait
from bench.lib.report import Row, print_report
from cli.simulation import simulate
from runtime.checkpoints.tiny_models import write_model
from runtime.contract.footprint_ledger import Footprint, Key, Times
from runtime.engine.vllm.memory_estimate import estimate
from runtime.sim import profile
from runtime.sim.profile import ModelFacts
from runtime.wire.model_spec import ModelSpec
from scheduler.sim.simulator import NodePlan, Scenario
from scheduler.sim.traces import Arrival
from scheduler.state.messages import StoredModel

GIB = 2**30
NAMES = ("m-a", "m-b", "m-c")
SHARES = (5, 3, 2)
GAP_S = 4.0  # mean, between calls
SIM_GPU = "L40S"  # 48 GiB: two of three models of SIM_BYTES fit
SIM_BYTES = 20 * GIB
HOT_CALLS = 5
LEAD_S = 5.0
QUIET_S = 6.0  # a replica may be evicted after its dwell time


def calls(count: int, seed: int = 3) -> list[tuple[float, str]]:
    """(seconds from the start, model) of each call."""
    random, at_s, found = Random(seed), 0.0, []
    for _ in range(count):
        at_s += random.expovariate(1 / GAP_S)
        found.append((at_s, random.choices(NAMES, SHARES)[0]))
    return found


def stub_specs() -> tuple[list[ModelSpec], str, tuple[int, ...]]:
    """(models, the device, the sleep rungs)."""
    args = {"start_s": 2.0, "ttft_s": 0.05, "token_s": 0.01, "sleep_s": 0.3, "wake_1_s": 0.6}
    specs = [
        ModelSpec(name=name, source="/m", engine="stub", engine_args=args,
                  device_memory_bytes=SIM_BYTES)
        for name in NAMES
    ]  # fmt: skip
    return specs, "simulated:1x48GiB", (1, 2)


def vllm_specs(folder: Path) -> tuple[list[ModelSpec], str, tuple[int, ...]]:
    """Likewise: tiny models, eager, on this host's memory; vLLM on CPU can't sleep."""
    args = {"enforce_eager": True, "max_model_len": 512}
    specs = [
        ModelSpec(name=name, source=str(write_model(folder, name)), engine_args=args)
        for name in NAMES
    ]
    size = max(estimate(spec, spec.source, "cpu").total_bytes for spec in specs)
    return specs, f"cpu:{int(2.4 * size)}", ()


def add(stoker: Stoker, spec: ModelSpec) -> None:
    body: dict[str, Any] = {"name": spec.name, "source": spec.source, "engine": spec.engine,
                            "engine_args": spec.engine_args, "forecast": "off"}  # fmt: skip
    if spec.device_memory_bytes:
        body["device_memory_bytes"] = spec.device_memory_bytes
    stoker.admin("/admin/models", body)


def one_call(stoker: Stoker, model: str) -> float:
    began = boot_s()
    return first_token(stoker.router, model) - began


def calibrate(stoker: Stoker, began: float) -> tuple[float, list[tuple[float, str]]]:
    """Each model cold and hot, and cold again.

    (the median time to first token of a hot call, when which model was called).
    """
    hot, done = [], []
    for name in (*NAMES, *NAMES):
        for turn in range(1 + HOT_CALLS):
            done.append((time.monotonic() - began, name))
            ttft = one_call(stoker, name)
            if turn:
                hot.append(ttft)
        time.sleep(QUIET_S)
    return statistics.median(hot), done


def ledger(stoker: Stoker) -> list[Footprint]:
    """What the live scheduler has measured, by its medians."""
    found = []
    for name in NAMES:
        for kind in stoker.admin(f"/admin/models/{name}/footprint")["measured"]:
            key = Key(name, kind["launch_key"], kind["engine"], kind["engine_version"],
                      kind["device_kind"])  # fmt: skip
            times = {step: Times(samples=(t["p50_s"],)) for step, t in kind["times"].items()}
            found.append(Footprint(key=key, residue_bytes=kind["residue_bytes"], times=times))
    return found


def play(stoker: Stoker, plan: list[tuple[float, str]]) -> list[float]:
    """The calls at their times; each one's time to first token."""
    ttft: list[float | None] = [None] * len(plan)

    def call(index: int, model: str) -> None:
        ttft[index] = one_call(stoker, model)

    began, threads = time.monotonic(), []
    for index, (at_s, model) in enumerate(plan):
        time.sleep(max(0.0, began + at_s - time.monotonic()))
        thread = threading.Thread(target=call, args=(index, model))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    if None in ttft:
        raise SystemExit("a call was not answered")
    return [t for t in ttft if t is not None]


def simulated(
    known: list[Footprint], hot_s: float, before: list[tuple[float, str]],
    plan: list[tuple[float, str]], rungs: tuple[int, ...],
) -> list[float]:  # fmt: skip
    """The same calls in virtual time: those of the calibration too, which leave models warm."""
    gpu = profile.gpu(SIM_GPU)
    # so many bytes are read for a token that a hot call's first one takes as long as it did live
    active = max(1.0, (hot_s - profile.STEP_S) * gpu.memory_rate * profile.DECODE_SHARE)
    facts = {name: ModelFacts(weights_bytes=1, active_bytes=int(active)) for name in NAMES}
    models = [
        StoredModel(
            spec=ModelSpec(name=name, source=f"/{name}", engine="stub", forecast="off",
                           device_memory_bytes=SIM_BYTES)
        )
        for name in NAMES
    ]  # fmt: skip
    known = [replace(f, key=replace(f.key, launch_key="live")) for f in known]
    report = simulate(
        Scenario(
            nodes=[NodePlan("n1", devices=1, gpu=SIM_GPU, rungs=rungs)], models=models,
            arrivals=[Arrival(at_s, model, 1, 4) for at_s, model in (*before, *plan)],
            facts=facts, ledger=known, duration_s=plan[-1][0] + 60.0, lead_s=LEAD_S,
        )
    )  # fmt: skip
    begins = plan[0][0] + LEAD_S - 1e-6
    return [t for t, at_s in zip(report.ttft, report.arrived, strict=True) if at_s >= begins]


def p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.95))]


def rows(label: str, live: list[float], sim: list[float]) -> list[Row]:
    found = []
    for name, figure in (("p50", statistics.median), ("p95", p95), ("mean", statistics.fmean)):
        ours, theirs = figure(sim), figure(live)
        error = abs(ours - theirs) / theirs
        found.append(Row(f"TTFT {name} s simulated, {label}", ours, theirs, "live"))
        if name != "mean":
            found.append(Row(f"error of {name}, {label}", error, 0.15, "target", "<= 1"))
    return found


def measure(engine: str, count: int, folder: Path) -> list[Row]:
    specs, device, rungs = stub_specs() if engine == "stub" else vllm_specs(folder / "models")
    plan = calls(count)
    folder.mkdir(exist_ok=True)
    with stoker_up(folder, device, launcher=engine == "vllm") as stoker:
        for spec in specs:
            add(stoker, spec)
        began = time.monotonic()
        hot_s, before = calibrate(stoker, began)
        wait(lambda: len(ledger(stoker)) >= len(NAMES), "the ledger")
        known = ledger(stoker)
        offset_s = time.monotonic() - began
        live = play(stoker, plan)
    later = [(offset_s + at_s, model) for at_s, model in plan]
    return rows(f"{engine}, {count} calls", live, simulated(known, hot_s, before, later, rungs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the stub engine only, 8 calls")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", nargs="+", choices=("stub", "vllm"), default=["stub", "vllm"])
    options = parser.parse_args()
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        for engine in ["stub"] if options.quick else options.engine:
            count = 8 if options.quick else 60
            found += measure(engine, count, Path(folder) / engine)
    print_report("honesty", found, options.json)


if __name__ == "__main__":
    main()
