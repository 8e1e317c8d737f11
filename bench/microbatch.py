"""What merging calls that arrive one by one gains on a real vLLM: a tiny model on this host's CPU.

    python bench/microbatch.py [--quick] [--json]

One `stoker up` with two models of the same weights: one whose spec has `batching`, one without;
both hot. Closed-loop callers ask one and the other in turn, several rounds; each figure is the
median. The forward pass of a batch costs little more than that of one; what merging saves is what
an engine spends on each request beside it, and what it costs is the wait for others.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import uvloop

from bench.lib.real_engine import stoker_up
from bench.lib.report import Row, print_report
from runtime.checkpoints.tiny_models import write_model

BATCHING = {"max_batch_size": 32, "max_wait_ms": 5, "endpoints": ["embeddings", "completions"]}
CONNECTIONS = (1, 8, 32)


class Kind(NamedTuple):
    """One sort of call."""

    name: str
    path: str
    engine_args: dict[str, object]
    body: dict[str, object]


KINDS = (
    Kind("embeddings", "/v1/embeddings", {"runner": "pooling", "convert": "embed"},
         {"input": "the quick brown fox " * 4}),
    Kind("completions of 8 tokens", "/v1/completions", {},
         {"prompt": "the quick brown fox " * 4, "max_tokens": 8, "ignore_eos": True}),
)  # fmt: skip


class Figures(NamedTuple):
    """One round."""

    per_s: float
    p50_ms: float
    p99_ms: float


async def load(url: str, body: dict[str, object], connections: int, seconds: float) -> Figures:
    """`connections` callers, each with one call at a time."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def caller() -> None:
            while (begun := time.perf_counter()) < until:
                async with session.post(url, json=body) as answer:
                    text = await answer.read()
                    if answer.status != 200:
                        raise SystemExit(f"{url}: {answer.status} {text[:300]!r}")
                times.append(time.perf_counter() - begun)

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(connections)))
        took = time.perf_counter() - began
    times.sort()
    p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
    return Figures(len(times) / took, 1000 * statistics.median(times), 1000 * p99)


def medians(rounds: list[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def compare(router: str, kind: Kind, rounds: int, seconds: float) -> list[Row]:
    """Batched against plain."""
    out = []
    url = router + kind.path
    for connections in CONNECTIONS:
        taken: dict[str, list[Figures]] = {"plain": [], "batched": []}
        for _ in range(rounds):
            for model, found in taken.items():
                body = {"model": model, **kind.body}
                found.append(uvloop.run(load(url, body, connections, seconds)))
        ours, plain = medians(taken["batched"]), medians(taken["plain"])
        where = f"{kind.name}, {connections} callers"
        out += [
            Row(f"requests/s, {where}", ours.per_s, plain.per_s, "without"),
            Row(f"p50 ms, {where}", ours.p50_ms, plain.p50_ms, "without"),
            Row(f"p99 ms, {where}", ours.p99_ms, plain.p99_ms, "without"),
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rounds, seconds = (1, 2.0) if options.quick else (5, 5.0)
    report: list[Row] = []
    for kind in KINDS:
        with (
            tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder,
            stoker_up(Path(folder)) as stoker,
        ):
            source = str(write_model(Path(folder) / "models", "tiny"))
            args = {"enforce_eager": True, "max_model_len": 512, **kind.engine_args}
            for name, more in (("plain", {}), ("batched", {"batching": BATCHING})):
                spec = {"name": name, "source": source, "engine_args": args, **more}
                stoker.admin("/admin/models", spec)
                uvloop.run(load(stoker.router + kind.path, {"model": name, **kind.body}, 1, 1))
            report += compare(stoker.router, kind, rounds, seconds)
    print_report("microbatch", report, options.json)


if __name__ == "__main__":
    main()
