"""Waiting for what a registry will say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(question: Callable[[], Awaitable[T]], deadline_s: float = 60.0) -> T:
    """The first truthy answer. Fails after `deadline_s` seconds, with the last answer."""
    deadline = time.monotonic() + deadline_s
    while not (answer := await question()):
        assert time.monotonic() < deadline, f"still {answer!r} after {deadline_s} s"
        await asyncio.sleep(0.05)
    return answer


async def still_waits(task: asyncio.Task[T], for_s: float = 0.3) -> bool:
    """True if the task has not ended after `for_s` seconds."""
    await asyncio.wait({task}, timeout=for_s)
    return not task.done()
