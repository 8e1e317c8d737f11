"""Switching between two models that do not fit together: each call evicts the other model.

    python bench/switch.py [--quick] [--json] [--switches N] [--plain-switches N]

Ours: one `stoker up` whose device holds one of two tiny models; the calls take turns between them,
each once the model that is up may be evicted (`scheduler.min_dwell_s`, as set by default). The
baseline is done by hand: the plain vLLM that runs is killed, the other one is started, its health
is polled every 20 ms, then it is asked the same. Seconds from the call (from the kill) to the first
token; the first plain one has nothing to kill, which takes milliseconds. A plain switch takes half
a minute, so there are fewer of them; they come in between.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.real_engine import Plain, stoker_up
from bench.lib.report import Row, print_report
from runtime.checkpoints.tiny_models import write_model
from runtime.contract.config import SchedulerConfig
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec

SWITCHES, PLAIN_SWITCHES = 20, 6
DWELL_S = SchedulerConfig().min_dwell_s + 1.0  # and what the scheduler needs to hear of it


def write_specs(folder: Path) -> tuple[list[ModelSpec], int]:
    """(two models, a device's bytes that hold one of them)."""
    args = {"enforce_eager": True, "max_model_len": 512}
    specs = [
        ModelSpec(name=name, source=str(write_model(folder, name)), engine_args=args)
        for name in ("tiny-a", "tiny-b")
    ]
    return specs, int(1.5 * max(estimate(s, s.source, "cpu").total_bytes for s in specs))


def measure(folder: Path, switches: int, plain_switches: int) -> tuple[list[float], list[float]]:
    """Seconds of each of (our switches, plain ones)."""
    specs, size = write_specs(folder / "models")
    ours: list[float] = []
    theirs: list[float] = []
    with contextlib.ExitStack() as stack:
        # Each of our switches is a start: bench/shells.py has the other way.
        stoker = stack.enter_context(
            stoker_up(folder, f"cpu:{size}", STOKER_SCHEDULER_SHELLS="false")
        )
        plain = Plain(folder)
        stack.callback(plain.kill)
        for spec in specs:
            stoker.add(spec)
        stoker.switch(specs[1])
        for turn in range(switches):
            time.sleep(DWELL_S)
            ours.append(stoker.switch(specs[turn % 2]).first_token_s)
            if stoker.replicas(specs[(turn + 1) % 2].name):
                raise SystemExit("both models are up: they fit together after all")
            if len(theirs) < plain_switches * (turn + 1) / switches:
                theirs.append(plain.switch(specs[len(theirs) % 2]).first_token_s)
    return ours, theirs


def p95(values: list[float]) -> float:
    """With fewer than 20 values: the largest."""
    return sorted(values)[-(len(values) // 20) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one switch of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--switches", type=int, default=SWITCHES)
    parser.add_argument("--plain-switches", type=int, default=PLAIN_SWITCHES)
    options = parser.parse_args()
    counts = (1, 1) if options.quick else (options.switches, options.plain_switches)
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        ours, theirs = measure(Path(folder), *counts)
    name = f"plain vLLM x{len(theirs)}"
    rows = [
        Row(f"switch to first token s, p50 of {len(ours)}", statistics.median(ours),
            statistics.median(theirs), name),
        Row(f"switch to first token s, p95 of {len(ours)}", p95(ours), p95(theirs), name),
    ]  # fmt: skip
    print_report("switch", rows, options.json)


if __name__ == "__main__":
    main()
