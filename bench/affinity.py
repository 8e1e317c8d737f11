"""Routing policies on traces whose prompts share beginnings, through the router's own admission.

    python bench/affinity.py [--quick] [--json] [--traces DIR] [--replicas N ...] [--routers N ...]
                             [--workload NAME ...] [--load SHARE] [--cache BLOCKS]

Workloads: Mooncake's `conversation` and `synthetic` traces, whose `hash_ids` name the 512-token
blocks of each prompt, and `system prompt`: generated questions of 300 tokens, each after the same
4,096 tokens. A block is written out as 2,048 bytes made of its id, so the keys are what
runtime/router/call/prompt.py makes of a real body; what a prompt shares with another is what its
ids say. The traces do not tell the answers' own blocks, nor a limit of tokens, nor sessions: "by
session" is ours where each caller names its conversation, which is guessed from its first blocks.

In virtual time, a replica reads prompts one after the other, PREFILL tokens that its cache lacks a
second, and writes each answer beside the others, a token each TOKEN_S. Its cache holds `--cache`
blocks and forgets the least recently used. Arrivals keep the trace's order and proportions, spread
evenly within its time steps, stretched so that reading without any cache would keep the replicas
busy `--load` of the time (of the system prompt only the questions count). Several routers get
calls at random and know of each other nothing. Only what decides differs between policies.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.report import Row, print_report
from runtime.router.admission.affinity import Affinity
from runtime.router.admission.decisions import Admission, Forward
from runtime.router.admission.fairness import RequestProfile
from runtime.router.call.body import Head
from runtime.router.call.prompt import keys_of, tokens_of
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable

BLOCK_TOKENS = 512
PREFILL = 10_000.0  # tokens a second and replica
TOKEN_S = 0.02
SEED = 1
CHAT = "/v1/chat/completions"
TRACES = {  # the file, and how many first blocks tell one conversation from another
    "conversation": ("mooncake_conversation_trace.jsonl", 2),
    "synthetic": ("mooncake_synthetic_trace.jsonl", 1),
}
SYSTEM_PROMPT = "system prompt"


class Request(NamedTuple):
    """One call. `blocks` are its prompt's, `work` the tokens that count for the load."""

    at_s: float
    tokens_in: int
    tokens_out: int
    blocks: tuple[int, ...]
    work: int
    profile: RequestProfile
    session: int  # below zero, as prompt.py's


# -------------------------------------------------------------------------------- workloads


def profile_of(blocks: tuple[int, ...], tokens_in: int) -> RequestProfile:
    """What the router's proxy would make of a chat call with that prompt."""
    text = b"".join(b"%08x" % block * (4 * BLOCK_TOKENS // 8) for block in blocks)
    content = text[: 4 * tokens_in]
    body = b'{"messages":[{"role":"user","content":"%b"}],"model":"m"}' % content
    keys = keys_of(CHAT, (), body, Head(), "m", "anonymous")
    return RequestProfile(tokens=tokens_of(body, Head()), affinity=keys)


def session_of(blocks: tuple[int, ...]) -> int:
    """A session's key."""
    return ~crc32(repr(blocks).encode())


def read(file: Path, told_by: int) -> list[Request]:
    """A Mooncake trace, equal timestamps spread evenly until the next."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    made: list[Request] = []
    first = 0
    while first < len(rows):
        begins = rows[first]["timestamp"]
        end = first
        while end < len(rows) and rows[end]["timestamp"] == begins:
            end += 1
        step = rows[end]["timestamp"] - begins if end < len(rows) else 0
        for index, row in enumerate(rows[first:end]):
            blocks, tokens = tuple(row["hash_ids"]), row["input_length"]
            at_s = (begins + step * index / (end - first)) / 1000
            profile = profile_of(blocks, tokens)
            session = session_of(blocks[:told_by])
            made.append(
                Request(at_s, tokens, row["output_length"], blocks, tokens, profile, session)
            )
        first = end
    return made


def system_prompt(count: int) -> list[Request]:
    """Questions of 300 tokens, each its own, after eight blocks that all of them share."""
    random, at_s = Random(SEED), 0.0
    shared, tokens = tuple(range(8)), 8 * BLOCK_TOKENS + 300
    made = []
    for number in range(count):
        at_s += random.expovariate(1.0)
        blocks = (*shared, 1000 + number)
        profile = profile_of(blocks, tokens)
        made.append(Request(at_s, tokens, 200, blocks, 300, profile, session_of(blocks)))
    return made


# -------------------------------------------------------------------------------- policies


class RoundRobin(Affinity):
    """Whatever the request."""

    turn = 0

    def pick(self, keys: tuple[int, ...], loads: Mapping[str, int], tokens: int) -> str | None:
        self.turn += 1
        return list(loads)[self.turn % len(loads)]


class Hashed(Affinity):
    """Bounded loads on one key alone, e = 0.25: the first replica in the order of the key's hashes
    that has room."""

    def __init__(self, cut: int) -> None:
        super().__init__()
        self.cut = cut

    def pick(self, keys: tuple[int, ...], loads: Mapping[str, int], tokens: int) -> str | None:
        key = keys[min(self.cut, len(keys) - 1)]
        bound = 1.25 * (sum(loads.values()) + tokens) / len(loads)
        left = dict(loads)
        while loads[chosen := self.home(key, left)] > bound:
            del left[chosen]
        return chosen

    def sent(self, keys: tuple[int, ...], replica_id: str) -> None:
        """It remembers nothing."""


class Remembered(Affinity):
    """Ours without homes."""

    def home(self, key: int, replica_ids: object) -> str:
        return ""

    def pick(self, keys: tuple[int, ...], loads: Mapping[str, int], tokens: int) -> str | None:
        return super().pick(keys, _Loads(loads), tokens) or None


class _Loads(dict[str, int]):
    """A home that never has room."""

    def __missing__(self, replica_id: str) -> int:
        return sys.maxsize


POLICIES: dict[str, tuple[Callable[[], Affinity], Callable[[Request], RequestProfile]]] = {
    "round robin": (RoundRobin, lambda r: RequestProfile(tokens=r.profile.tokens, affinity=(0,))),
    "least requests": (Affinity, lambda r: RequestProfile()),
    "least tokens": (Affinity, lambda r: RequestProfile(tokens=r.profile.tokens)),
    "hash of 1 KiB": (lambda: Hashed(0), lambda r: r.profile),
    "hash of 4 KiB": (lambda: Hashed(2), lambda r: r.profile),
    "remembered only": (Remembered, lambda r: r.profile),
    "ours": (Affinity, lambda r: r.profile),
    "ours, by session": (Affinity, lambda r: r.profile._replace(affinity=(r.session,))),
}


# -------------------------------------------------------------------------------- simulation


@dataclass
class Replica:
    """One engine: its prefix cache and when it has read all that was sent to it."""

    cache_blocks: int
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    free_at: float = 0.0
    tokens: int = 0  # outstanding now
    served: int = 0

    def hits(self, blocks: tuple[int, ...]) -> int:
        """How many of the first blocks need not be read; then all of them are in the cache."""
        count = 0
        while count < len(blocks) and blocks[count] in self.cache:
            count += 1
        for block in reversed(blocks):  # an end goes before its beginning
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.cache_blocks:
            self.cache.popitem(last=False)
        return count


@dataclass
class Figures:
    """What one policy came to."""

    hit_share: float  # of blocks
    mean_s: float  # to the first token
    p99_s: float
    served: float  # the busiest replica's tokens / the mean
    queued: float  # the same of outstanding tokens, mean over the arrivals
    decision_us: float  # CPU of arrive


def simulate(
    requests: list[Request], policy: str, replicas: int, routers: int, load: float, cache: int
) -> Figures:
    """Send every request where `policy` says."""
    make, seen_as = POLICIES[policy]
    fleet = {f"r{i}": Replica(cache) for i in range(replicas)}
    fronts = [_router(make(), tuple(fleet)) for _ in range(routers)]
    stretch = sum(r.work for r in requests) / (replicas * PREFILL * load) / requests[-1].at_s
    random = Random(SEED)
    ending: list[tuple[float, int, int, str, int]] = []  # a heap of what `_end` gets
    ttft, queued, hits, spent_ns = [], 0.0, 0, 0
    for number, request in enumerate(requests):
        now, tokens = request.at_s * stretch, request.tokens_in + request.tokens_out
        while ending and ending[0][0] <= now:
            _end(fronts, fleet, *heapq.heappop(ending))
        front = random.randrange(routers)
        profile = seen_as(request)
        began = time.perf_counter_ns()
        decision = fronts[front].arrive(str(number), "m", now, profile)
        spent_ns += time.perf_counter_ns() - began
        assert isinstance(decision, Forward)
        replica_id = decision.endpoint.replica_id
        replica = fleet[replica_id]
        found = replica.hits(request.blocks)
        hits += found
        missed = max(1, request.tokens_in - found * BLOCK_TOKENS)
        replica.free_at = max(now, replica.free_at) + missed / PREFILL
        ttft.append(replica.free_at - now)
        replica.tokens += tokens
        replica.served += tokens
        ends_at = replica.free_at + request.tokens_out * TOKEN_S
        heapq.heappush(ending, (ends_at, number, front, replica_id, tokens))
        queued += _unevenness([r.tokens for r in fleet.values()])
    ttft.sort()
    return Figures(
        hits / sum(len(r.blocks) for r in requests), sum(ttft) / len(ttft),
        ttft[int(0.99 * len(ttft))], _unevenness([r.served for r in fleet.values()]),
        queued / len(requests), spent_ns / len(requests) / 1000,
    )  # fmt: skip


def _router(affinity: Affinity, replica_ids: tuple[str, ...]) -> Admission:
    admission = Admission()
    admission._affinity = affinity
    endpoints = tuple(Endpoint(replica_id=r, base_url="http://r", key="k") for r in replica_ids)
    route = ModelRoute(name="m", endpoints=endpoints, target_concurrency=1_000_000)  # none waits
    admission.routes(RouteTable(version=1, models=(route,)), 0.0)
    return admission


def _end(
    fronts: list[Admission], fleet: dict[str, Replica], now: float, number: int, front: int,
    replica_id: str, tokens: int,
) -> None:  # fmt: skip
    fronts[front].answered(str(number), now, 200)
    fronts[front].finished(str(number), now)
    fleet[replica_id].tokens -= tokens


def _unevenness(values: list[int]) -> float:
    return max(values) * len(values) / sum(values)


# -------------------------------------------------------------------------------- report


def workload(name: str, traces: Path, quick: bool) -> list[Request] | None:
    """Its requests; None: its trace is not there."""
    if name == SYSTEM_PROMPT:
        return system_prompt(2000 if quick else 8000)
    file_name, told_by = TRACES[name]
    if not (traces / file_name).is_file():
        return None
    requests = read(traces / file_name, told_by)
    return requests[:2000] if quick else requests


def table(found: dict[str, Figures]) -> str:
    """All figures, as a table of Markdown."""
    lines = [
        "| policy | blocks hit | TTFT mean | p99 | served, max / mean | outstanding, max / mean"
        " | CPU |",
        "| --- " * 7 + "|",
    ]
    for name, f in found.items():
        lines.append(
            f"| {name} | {100 * f.hit_share:.1f} % | {f.mean_s:.2f} s | {f.p99_s:.1f} s |"
            f" {f.served:.2f} | {f.queued:.2f} | {f.decision_us:.1f} us |"
        )
    return "\n".join(lines)


def rows(what: str, found: dict[str, Figures]) -> list[Row]:
    """Ours against least tokens."""
    ours, base, name = found["ours"], found["least tokens"], "least tokens"
    gains = not what.startswith(SYSTEM_PROMPT)
    return [
        Row(
            f"{what}: blocks hit", ours.hit_share, base.hit_share, name, ">= 1.3" if gains else None
        ),
        Row(f"{what}: TTFT mean, s", ours.mean_s, base.mean_s, name, "<= 1"),
        Row(f"{what}: TTFT p99, s", ours.p99_s, base.p99_s, name, "<= 1.05"),
        Row(f"{what}: served, max / mean", ours.served, base.served, name, "<= 1.1"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    names = [*TRACES, SYSTEM_PROMPT]
    parser.add_argument("--workload", nargs="+", choices=names, default=names)
    parser.add_argument("--replicas", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--routers", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--cache", type=int, default=1000, help="blocks of a replica's cache")
    parser.add_argument("--quick", action="store_true", help="8 replicas, 2,000 requests")
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    if o.quick:
        o.replicas, o.routers = [8], [1]
    made: list[Row] = []
    missing = []
    for name in o.workload:
        requests = workload(name, o.traces, o.quick)
        if requests is None:
            missing.append(TRACES[name][0])
            continue
        for replicas in o.replicas:
            for routers in o.routers:
                what = f"{name}, {replicas} replicas, {routers} router{'s' * (routers > 1)}"
                found = {
                    policy: simulate(requests, policy, replicas, routers, o.load, o.cache)
                    for policy in POLICIES
                }
                made += rows(what, found)
                if not o.json:
                    print(f"\n{what}\n\n{table(found)}", flush=True)
    note = (
        f"not in {o.traces}: {', '.join(missing)}; give their folder with --traces (they are in"
        " github.com/kvcache-ai/Mooncake, FAST25-release/traces)"
    )
    print_report("bench/affinity.py", made, o.json, note if missing else None)


if __name__ == "__main__":
    main()
