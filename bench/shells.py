"""A switch between two models of one architecture: in the engine that runs, or by starting one.

    python bench/shells.py [--case tiny|compiled] [--switches N] [--json]

Two `stoker up` take turns, one with `scheduler.shells` (the default) and one without, so that each
of its switches is a forked start. Both have started both models before, so that what is compiled is
on the disk. Each has one device that holds one of the two models. Seconds from a call for the model
that is not up, once the other may be evicted (`scheduler.min_dwell_s`), to its first token. After
each switch both are asked the same PROMPTS, greedily: an answer that differs ends the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.real_engine import Stoker, boot_s, call, first_token, stoker_up, write_llama
from bench.lib.report import Row, print_report
from bench.switch import DWELL_S
from runtime.checkpoints.tiny_models import write_model
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec

PROMPTS = ("hello", "one two three", "The capital of France is", "x", "a b a b a")
TARGET = "<= 0.2"  # of a forked start, for the compiled pair
WAYS = ("shells", "starts")


def write_specs(folder: Path, case: str) -> list[ModelSpec]:
    """Two models that differ in their weights."""
    specs = []
    for seed, name in enumerate(("first", "second"), 1):
        source = write_model(folder, f"tiny-{name}")
        if case == "compiled":
            big = folder / name
            source = write_llama(source, big, hidden=1024, inner=2816, layers=16, seed=seed)
        args = {"enforce_eager": case == "tiny", "max_model_len": 512}
        # Compiling for the other way takes minutes: nothing goes for its idleness meanwhile.
        specs.append(ModelSpec(name=name, source=str(source), engine_args=args, idle_s=3600.0))
    return specs


def answers(stoker: Stoker, model: str) -> list[str]:
    """Greedy answers to PROMPTS."""
    body = {"model": model, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    url = f"{stoker.router}/v1/completions"
    return [json.loads(call(url, body | {"prompt": p}))["choices"][0]["text"] for p in PROMPTS]


def switch(stoker: Stoker, spec: ModelSpec) -> tuple[float, int]:
    """Seconds to its first token, and the process that it came from."""
    began = boot_s()
    seconds = first_token(stoker.router, spec.name) - began
    (replica,) = stoker.replicas(spec.name)
    return seconds, replica["pid"]


def measure(folder: Path, case: str, switches: int) -> dict[str, list[float]]:
    """Seconds of each switch, by the way it went."""
    specs = write_specs(folder / "models", case)
    size = int(1.5 * max(estimate(s, s.source, "cpu").total_bytes for s in specs))
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        both = {
            way: stack.enter_context(
                stoker_up(folder / way, f"cpu:{size}", STOKER_SCHEDULER_SHELLS=flag)
            )
            for way, flag in zip(WAYS, ("true", "false"), strict=True)
        }
        pids = {way: _warm_up(stoker, specs) for way, stoker in both.items()}
        for turn in range(switches):
            time.sleep(DWELL_S)
            said = {}
            for way in WAYS if turn % 2 else reversed(WAYS):
                seconds, pid = switch(both[way], specs[turn % 2])
                if (pid == pids[way]) != (way == "shells"):
                    raise SystemExit(f"{way}: process {pids[way]}, now {pid}")
                pids[way] = pid
                taken[way].append(seconds)
                said[way] = answers(both[way], specs[turn % 2].name)
            if said["shells"] != said["starts"]:
                raise SystemExit(f"the answers differ: {said}")
    return taken


def _warm_up(stoker: Stoker, specs: list[ModelSpec]) -> int:
    """Start both models; the process of the second, which is up."""
    for spec in specs:
        stoker.add(spec)
        _, pid = switch(stoker, spec)
        time.sleep(DWELL_S)  # its canary is asked for meanwhile
    return pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("tiny", "compiled"), default="tiny")
    parser.add_argument("--switches", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        for way in WAYS:
            (Path(folder) / way).mkdir()
        taken = measure(Path(folder), options.case, options.switches)
    ours, theirs = (statistics.median(taken[way]) for way in WAYS)
    name = f"forked start x{len(taken['starts'])}"
    where = f"switch to first token s, {options.case}, p50 of {len(taken['shells'])}"
    target = TARGET if options.case == "compiled" else None
    rows = [
        Row(where, ours, theirs, name, target),
        Row("the slowest", max(taken["shells"]), max(taken["starts"]), name),
    ]
    print_report("shells", rows, options.json)


if __name__ == "__main__":
    main()
