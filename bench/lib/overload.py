"""Four times the capacity: what is still answered, and how quickly the rest is told to come back.

The engine answers 32 requests at a time, each in 0.4 s: 80 a second. The router may send it 4 more,
so that it never runs dry, and hold 64: one that is let in has its answer within 1.65 s.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from bench.lib.peers import LIB, Target, python_server
from bench.lib.report import Row

SLOTS, SERVICE_S, QUEUE, AHEAD = 32, 0.4, 64, 4
CAPACITY = SLOTS / SERVICE_S
LIMIT_MS = 1000 * ((SLOTS + AHEAD + QUEUE) / CAPACITY + SERVICE_S)


def rows(seconds: float) -> list[Row]:
    """The overload's figures against what they have to be."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-bench-"))
        engine = stack.enter_context(python_server("engine", "http_origin.py", SLOTS, SERVICE_S))
        router = stack.enter_context(
            python_server(
                "ours",
                "our_router.py",
                engine.port,
                Path(folder) / "o",
                "keys",
                SLOTS + AHEAD,
                QUEUE,
            )
        )
        _load(router, 1.0 * CAPACITY, 2.0)
        before = _rss(router)
        got = _load(router, 4.0 * CAPACITY, seconds)
        after = _rss(router)
    served = got["statuses"].pop("200", 0)
    refused = sum(got["statuses"].pop(status, 0) for status in ("429", "503"))
    other = sum(got["statuses"].values()) + got["unanswered"]
    # What was let in at the end is answered after it: at most the queue and the slots.
    goodput = max(0, served - SLOTS - AHEAD - QUEUE) / seconds
    name = "engine's capacity"
    return [
        Row("overload 4x: answered/s", goodput, CAPACITY, name, ">= 0.95"),
        Row("overload 4x: p99 ms of those answered", got["ok_p99_ms"], LIMIT_MS, "its limit",
            "<= 1.0"),
        Row("overload 4x: p99 ms of a refusal", got["refused_p99_ms"], 50.0, "its limit", "<= 1.0"),
        Row("overload 4x: refused", refused, got["sent"], "all sent"),
        Row("overload 4x: neither answered nor 429/503", other, got["sent"], "all sent", "<= 0.0"),
        Row("overload 4x: refused without Retry-After", got["no_retry_after"], max(1, refused),
            "refused", "<= 0.0"),
        Row("overload 4x: RSS MB", after, before, "before", "<= 1.05"),
    ]  # fmt: skip


def _rss(target: Target) -> float:
    assert target.pid is not None
    return psutil.Process(target.pid).memory_info().rss / 1e6


def _load(target: Target, rate: float, seconds: float) -> dict[str, Any]:
    argv = (LIB / "open_load.py", target.port, rate, seconds)
    ran = subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found
