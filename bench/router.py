"""What the router costs: against no proxy, nginx, vllm-router, LiteLLM and a naive aiohttp proxy.

    python bench/router.py [--quick] [--rounds N] [--json]

Every server is a process of its own, one worker each; phases alternate between the servers, and
each figure is the median of its rounds. CPU is user + system of the proxy's whole process tree:
the figure to trust where client, proxy and engine share few cores. LiteLLM gets the unary load
only. Ours checks a key that is held to every limit, and counts; beside it run one that lets
anybody in, and one that writes an access log too. Last comes the overload: an engine of known
capacity, four times as many requests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from bench.lib import overload, peers
from bench.lib.http_origin import CHUNKS
from bench.lib.peers import LIB, Missing, Target, python_server
from bench.lib.report import Row, print_report


class Phase(NamedTuple):
    """One load: its name, connections, and what is asked for."""

    name: str
    connections: int
    kind: str
    share: float  # of the time of one round


NO_KEYS = "ours, no keys"
UNARY = Phase("32", 32, "unary", 1.0)
PHASES = (
    UNARY,
    Phase("1", 1, "unary", 0.5),
    Phase("8", 8, "unary", 0.5),
    Phase("64 streams", 64, "stream", 1.0),
    Phase("64 paced", 64, "paced", 1.0),
)
SLOW = Phase("1000 slow", 1000, "slow", 1.0)


class Figures(NamedTuple):
    """One phase against one target."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float  # per request


def cpu_s(pid: int | None) -> float:
    """User + system seconds of a process tree so far."""
    if pid is None:
        return 0.0
    parent = psutil.Process(pid)
    times = [p.cpu_times() for p in (parent, *parent.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(target: Target, phase: Phase, seconds: float) -> Figures:
    """Run one phase. Ends the benchmark if an answer was wrong: then no figure means anything."""
    before = cpu_s(target.pid)
    argv = [LIB / "http_load.py", target.port, phase.connections, seconds, phase.kind]
    if target.name == NO_KEYS:
        argv.append("unused")
    out = subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, check=True
    ).stdout
    spent = cpu_s(target.pid) - before
    result = json.loads(out)
    if result["errors"]:
        raise SystemExit(f"{target.name}: {result['errors']} wrong answers in phase {phase.name}")
    count = result["requests"]
    return Figures(
        count / result["seconds"], result["p50_ms"], result["p99_ms"], 1000 * spent / count
    )


Results = dict[tuple[str, str], Figures]  # (target, phase) -> medians


def run(targets: list[Target], rounds: int, seconds: float, slow: tuple[str, ...]) -> Results:
    """Every phase against every target, `rounds` times over; then the 1,000 streams, of `slow`."""
    samples: dict[tuple[str, str], list[Figures]] = {}
    for target in targets:
        measure(target, UNARY, 0.3)  # warm up
    for _ in range(rounds):
        for phase in PHASES:
            for target in targets:
                if target.name == "LiteLLM" and phase is not UNARY:
                    continue
                figures = measure(target, phase, seconds * phase.share)
                samples.setdefault((target.name, phase.name), []).append(figures)
    for target in targets:
        if target.name in slow:
            samples[target.name, SLOW.name] = [measure(target, SLOW, 1.0)]
    return {
        key: Figures(*(statistics.median(column) for column in zip(*taken, strict=True)))
        for key, taken in samples.items()
    }


TARGETS = {
    ("CPU ms per 1,000 requests, 32 connections", "vllm-router"): "<= 1.0",
    ("CPU ms per 1,000 requests, 32 connections", "nginx"): "<= 5.0",
    ("requests/s, 32 connections", "LiteLLM"): ">= 100",
    ("CPU ms per stream, 5 ms apart", "vllm-router"): "<= 0.9",
    ("chunks/s, 64 streams back to back", "vllm-router"): ">= 3.0",
    ("added TTFT p50 ms, 64 streams, 5 ms apart", "direct"): "ours <= 0.4",
    ("added TTFT p99 ms, 64 streams, 5 ms apart", "direct"): "ours <= 2.0",
    ("p99 chunk gap ms, 1,000 streams at 10 chunks/s", "direct"): "<= 1.25",
}


def rows(results: Results, baselines: list[str]) -> list[Row]:
    """Ours against each baseline; added latency is over the direct figure of the same run."""
    out: list[Row] = []

    def row(metric: str, ours: float, baseline: float, name: str) -> None:
        out.append(Row(metric, ours, baseline, name, TARGETS.get((metric, name))))

    for name in baselines:
        unary, base = results["ours", "32"], results[name, "32"]
        if name != "direct":
            row("CPU ms per 1,000 requests, 32 connections",
                1000 * unary.cpu_ms, 1000 * base.cpu_ms, name)  # fmt: skip
        row("requests/s, 32 connections", unary.per_s, base.per_s, name)
        if name == "LiteLLM":
            continue
        for phase, what in (("1", ""), ("8", ""), ("64 paced", "TTFT ")):
            where = "64 streams, 5 ms apart" if what else f"{phase} connections"
            for figure in ("p50_ms", "p99_ms"):
                ours, direct, other = (
                    getattr(results[who, phase], figure) for who in ("ours", "direct", name)
                )
                row(f"added {what}{figure[:3]} ms, {where}", ours - direct, other - direct, name)
        ours, other = results["ours", "64 streams"], results[name, "64 streams"]
        row("chunks/s, 64 streams back to back", CHUNKS * ours.per_s, CHUNKS * other.per_s, name)
        if name != "direct":
            row("CPU ms per 1,000 chunks, back to back",
                1000 * ours.cpu_ms / CHUNKS, 1000 * other.cpu_ms / CHUNKS, name)  # fmt: skip
            ours, other = results["ours", "64 paced"], results[name, "64 paced"]
            row("CPU ms per stream, 5 ms apart", ours.cpu_ms, other.cpu_ms, name)
        if (name, SLOW.name) in results:
            ours, other = results["ours", SLOW.name], results[name, SLOW.name]
            row("p99 chunk gap ms, 1,000 streams at 10 chunks/s", ours.p99_ms, other.p99_ms, name)
    return out


def start_all(stack: contextlib.ExitStack, folder: Path, quick: bool) -> list[Target]:
    """The engine, every proxy that can run here, and ours; who cannot is named on stderr."""
    origin = stack.enter_context(python_server("direct", "http_origin.py"))
    targets = [origin._replace(pid=None)]
    for name, proxy in (
        ("nginx", peers.nginx(origin.port, folder)),
        ("vllm-router", peers.vllm_router(origin.port, folder, not quick)),
        ("LiteLLM", peers.litellm(origin.port, folder, not quick)),
    ):
        try:
            targets.append(stack.enter_context(proxy))
        except Missing as reason:
            print(f"*** NO ROWS FOR {name}: {reason}", file=sys.stderr)
    naive = python_server("naive aiohttp", "naive_proxy.py", origin.port)
    ours = [
        python_server(name, "our_router.py", origin.port, folder / kind, kind)
        for name, kind in ((NO_KEYS, "open"), ("ours, access log", "log"), ("ours", "keys"))
    ]
    return [*targets, *map(stack.enter_context, (naive, *ours))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, help="instead of 5")
    options = parser.parse_args()
    rounds, seconds, overload_s = (1, 0.8, 10.0) if options.quick else (5, 4.0, 60.0)
    rounds = options.rounds or rounds
    slow = ("direct", "ours") if options.quick else ("direct", "nginx", "vllm-router", "ours")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-bench-")))
        targets = start_all(stack, folder, options.quick)
        results = run(targets, rounds, seconds, slow)
    report = rows(results, [target.name for target in targets if target.name != "ours"])
    report += overload.rows(overload_s)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", file=sys.stderr)
    print_report("router", report, options.json)


if __name__ == "__main__":
    main()
