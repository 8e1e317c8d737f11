"""Collects calls that may share one request to an engine, for a few milliseconds.

Rules this file keeps:
- a call waits at most `max_wait_ms` here, and a batch is sent at once when it is full;
- what may be one caller's fault is nobody else's: after a 4xx, or an answer that cannot be taken
  apart, each goes alone; a caller who hangs up leaves the others' request as it is;
- a batch of one is no batch: that call goes its usual way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.router.call.body import read_head
from runtime.router.call.errors import CallError
from runtime.router.call.request import Call, Caller
from runtime.router.callers.memory import Memory
from runtime.router.proxy.batch_bodies import Part, merged, part_of, split
from runtime.router.proxy.exchange import Exchange
from runtime.router.proxy.responder import Client, Collected
from runtime.wire.model_spec import Batching

log = logging.getLogger("stoker.router")

_HEADERS = ((b"Content-Type", b"application/json"),)
Carry = Callable[[Call, Client], Awaitable[Exchange]]
_Key = tuple[str, str, tuple[tuple[str, bytes], ...], int]


class Answer(NamedTuple):
    """One call's own, and its share of what the request took."""

    status: int
    body: bytes
    replica_id: str
    held_s: float
    gpu_s: float


@dataclass(slots=True, eq=False)
class _Batch:
    calls: list[tuple[Call, Part, asyncio.Future[Answer | None]]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """One router's open batches. `carry` sends a request of the router's own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, memory: Memory, carry: Carry) -> None:
        self._memory = memory
        self._carry = carry
        self._loop = loop
        self._open: dict[_Key, _Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, rule: Batching, call: Call) -> Answer | None:
        """The call's answer; None: it has to go alone. Raises CallError."""
        part = part_of(rule, call.path, call.body)
        if part is None:
            return None
        key = (call.model, call.path, part.alike, call.caller.priority)
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = _Batch()
            batch.timer = self._loop.call_later(rule.max_wait_ms / 1000, self._close, key, batch)
        turn: asyncio.Future[Answer | None] = self._loop.create_future()
        batch.calls.append((call, part, turn))
        if len(batch.calls) >= rule.max_batch_size:
            self._close(key, batch)
        return await turn

    def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()

    def _close(self, key: _Key, batch: _Batch) -> None:
        """No more calls: send it."""
        assert batch.timer is not None
        batch.timer.cancel()
        del self._open[key]
        calls = [(call, part, turn) for call, part, turn in batch.calls if not turn.done()]
        if len(calls) == 1:
            calls[0][2].set_result(None)
        elif calls:
            task = self._loop.create_task(self._send(calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, calls: list[tuple[Call, Part, asyncio.Future[Answer | None]]]) -> None:
        try:
            answers = await self._answers([call for call, _, _ in calls], [p for _, p, _ in calls])
        except CallError as error:
            for _, _, turn in calls:
                if not turn.done():
                    turn.set_exception(error)
            return
        except asyncio.CancelledError:
            for _, _, turn in calls:
                turn.cancel()
            raise
        except Exception:
            log.exception("a batch of %d calls failed: each goes alone", len(calls))
            answers = [None] * len(calls)
        for (_, _, turn), answer in zip(calls, answers, strict=True):
            if not turn.done():
                turn.set_result(answer)

    async def _answers(self, calls: list[Call], parts: list[Part]) -> list[Answer | None]:
        first, body = calls[0], merged(parts)
        caller = Caller(first.caller.tenant, priority=first.caller.priority)
        together = Call(
            f"{first.request_id}-batch", first.model, first.path, _HEADERS, body, False,
            read_head(body), caller,
        )  # fmt: skip
        client = Collected(self._memory)
        try:
            taken = await self._carry(together, client)
        finally:
            client.close()
        alone: list[Answer | None] = [None] * len(calls)
        if not client.whole or 400 <= client.status < 500:
            return alone
        replica_id, held_s = taken.outcome.replica_id, taken.outcome.held_s
        gpu_s = taken.gpu_s / len(calls)
        body = bytes(client.body)
        bodies = [body] * len(calls) if client.status != 200 else split(first.path, body, parts)
        if bodies is None:
            log.warning("%s: the answer to %d calls can't be taken apart", first.model, len(calls))
            return alone
        return [Answer(client.status, each, replica_id, held_s, gpu_s) for each in bodies]
