"""What a change costs on a warm request: this checkout's router against that of another one.

    python bench/router_against.py CHECKOUT [--rounds N] [--json]

CHECKOUT is a folder with an older tree (`git worktree add FOLDER COMMIT`). Both routers are
processes of their own in front of one engine and take turns in every round, the one that goes first
too, so a busy machine is busy for both. Each figure is the median of its rounds; the ratio that
counts is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.http_origin import CHUNKS
from bench.lib.peers import Target, python_server
from bench.lib.report import Row, print_report
from bench.router import NO_KEYS, PHASES, UNARY, measure

LIMIT = "<= 1.05"  # what a change may cost
SIDES = ("before", "ours")
ROUND_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="the older tree")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = []
    for kind in ("open", "keys"):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-bench-")))
            rows += compare(start(stack, folder, kind, options.checkout), kind, options.rounds)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", file=sys.stderr)
    print_report("router_against", rows, options.json)


def start(
    stack: contextlib.ExitStack, folder: Path, kind: str, checkout: Path
) -> dict[str, Target]:
    """The engine, and in front of it the router of either tree."""
    origin = stack.enter_context(python_server("direct", "http_origin.py"))
    trees = {"before": checkout.resolve(), "ours": Path(__file__).resolve().parents[1]}
    name = NO_KEYS if kind == "open" else kind  # `measure` sends no key to that one
    return {
        side: stack.enter_context(
            python_server(
                name, str(tree / "bench/lib/our_router.py"), origin.port, folder / side, kind
            )
        )
        for side, tree in trees.items()
    }


def compare(targets: dict[str, Target], kind: str, rounds: int) -> list[Row]:
    """CPU a request (and a chunk) of every phase, in turns."""
    for target in targets.values():
        measure(target, UNARY, 0.3)  # warm up
    rows = []
    for phase in PHASES:
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(rounds):
            for side in SIDES if turn % 2 else reversed(SIDES):
                figures = measure(targets[side], phase, ROUND_S * phase.share)
                taken[side].append(figures.cpu_ms)
        rows.append(_row(f"{kind}, {phase.name}", taken, per=_unit(phase.kind)))
    return rows


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
