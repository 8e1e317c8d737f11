"""What a change costs on a warm request: this checkout's router against that of another one.

    python bench/router_against.py CHECKOUT [--rounds N] [--json]

CHECKOUT is a folder with an older tree (`git worktree add FOLDER COMMIT`). Both routers are
processes of their own in front of one engine and take turns, a quarter of a second each: a shared
machine changes its speed by a fifth from one second to the next, for both then. Each figure is the
median of its turns; the ratio that counts is the median of the turns' own ratios. Two processes of
the same code differ by a few percent for as long as they live, so all start again several times.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvloop

from bench.lib.http_load import KEY, load
from bench.lib.http_origin import CHUNKS
from bench.lib.peers import Target, python_server
from bench.lib.report import Row, print_report
from bench.router import PHASES, UNARY, Phase

LIMIT = "<= 1.05"  # what a change may cost
SIDES = ("before", "ours")
TURN_S = 0.25

Taken = dict[str, dict[str, list[float]]]  # by phase and side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="the older tree")
    parser.add_argument("--starts", type=int, default=8, help="of both routers")
    parser.add_argument("--turns", type=int, default=20, help="of each phase after each start")
    parser.add_argument("--kinds", nargs="+", choices=("open", "keys"), default=("open", "keys"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = []
    for kind in options.kinds:
        taken: Taken = {phase.name: {side: [] for side in SIDES} for phase in PHASES}
        for _ in range(options.starts):
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-")))
                compare(start(stack, folder, kind, options.checkout), kind, options.turns, taken)
        for phase in PHASES:
            where = f"{kind}, {phase.name}"
            rows.append(_row(where, taken[phase.name], per=_unit(phase.kind)))
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", file=sys.stderr)
    print_report("router_against", rows, options.json)


def start(
    stack: contextlib.ExitStack, folder: Path, kind: str, checkout: Path
) -> dict[str, Target]:
    """The engine, and in front of it the router of either tree."""
    origin = stack.enter_context(python_server("direct", "http_origin.py"))
    trees = {"before": checkout.resolve(), "ours": Path(__file__).resolve().parents[1]}
    return {
        side: stack.enter_context(
            python_server(
                side, str(tree / "bench/lib/our_router.py"), origin.port, folder / side, kind
            )
        )
        for side, tree in trees.items()
    }


def cpu_ms(target: Target, phase: Phase, seconds: float, key: str) -> float:
    """CPU time a request. Ends the benchmark if an answer was wrong: then no figure counts."""
    assert target.pid is not None
    clock = (~target.pid << 3) | 2  # that process's, as clock_getcpuclockid(3) makes it
    before = time.clock_gettime_ns(clock)
    result = uvloop.run(load(target.port, phase.connections, seconds, phase.kind, key))
    spent = time.clock_gettime_ns(clock) - before
    if result["errors"]:
        raise SystemExit(f"{target.name}: {result['errors']} wrong answers in {phase.name}")
    return spent / 1e6 / result["requests"]


def compare(targets: dict[str, Target], kind: str, turns: int, taken: Taken) -> None:
    """Add to `taken`: CPU ms a request, by phase and side."""
    key = "unused" if kind == "open" else KEY
    for target in targets.values():
        cpu_ms(target, UNARY, 2 * TURN_S, key)  # warm up
    for phase in PHASES:
        for turn in range(turns):
            for side in SIDES if turn % 2 else reversed(SIDES):
                taken[phase.name][side].append(cpu_ms(targets[side], phase, TURN_S, key))


def _unit(kind: str) -> tuple[str, float]:
    """What the CPU time is told of, and how many of it are in 1 ms a request."""
    return ("1,000 chunks", 1000 / CHUNKS) if kind == "stream" else ("1,000 requests", 1000.0)


def _row(where: str, taken: dict[str, list[float]], per: tuple[str, float]) -> Row:
    before, ours = taken["before"], taken["ours"]
    ratio = statistics.median(new / old for new, old in zip(ours, before, strict=True))
    baseline = statistics.median(before) * per[1]
    return Row(f"CPU ms per {per[0]}, {where}", ratio * baseline, baseline, "before", LIMIT)


if __name__ == "__main__":
    main()
