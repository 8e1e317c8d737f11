"""Sends one piece of work through the proxy as any caller's call, and says how it ended.

Rule this file keeps: only an engine's own answer, or a refusal that waiting cannot change, ends a
piece; whatever says "not now" is a reason to send it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from runtime.router.call.body import read_head
from runtime.router.call.errors import CallError
from runtime.router.call.request import Call, Caller
from runtime.router.jobs.plan import Item, Key, Plan, Verdict
from runtime.router.jobs.store.database import StoreError
from runtime.router.proxy.responder import MAX_ANSWER_BYTES, Collected
from runtime.router.proxy.serving import Proxy
from runtime.router.proxy.upstream import Headers

log = logging.getLogger("stoker.router.jobs")


class Sent(NamedTuple):
    """How a call ended: an answer's status and body, or (status 0) `error`."""

    verdict: Verdict
    status: int = 0
    body: bytes = b""
    error: CallError | None = None
    retry_after_s: float = 0.0


def _sent(client: Collected) -> Sent:
    """The verdict on what came."""
    if client.too_large:
        message = f"the answer has more than {MAX_ANSWER_BYTES} bytes"
        return Sent("answered", error=CallError(502, "answer_too_large", message))
    if client.refused is not None:
        return _refused(client.refused)
    if not client.whole or not client.begun:
        message = "the engine's answer broke off"
        return Sent("broken", error=CallError(502, "replica_failed", message))
    if client.status in (429, 503):
        message = f"the engine answered with status {client.status}"
        error = CallError(client.status, "engine_busy", message)
        return Sent("refused", error=error, retry_after_s=_retry_after_s(client.headers))
    return Sent("answered", client.status, bytes(client.body))


async def send(
    proxy: Proxy,
    request_id: str,
    model: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    owner: Caller,
    counted: bool = False,
) -> Sent:
    """A call that `owner` left here: it counts as its key stands now; `counted`: as in `Call`."""
    client = Collected(proxy.memory)
    try:
        caller = proxy.keys.on_behalf(owner, time.time())
        call = Call(
            request_id, model, path, headers, body, False, read_head(body), caller,
            counted=counted,
        )  # fmt: skip
        with proxy.memory.taken(len(body)):
            await proxy.serve(call, client)
    except CallError as error:
        return _refused(error)
    except ConnectionError:
        pass  # `client` knows why
    except Exception:  # it is this call's alone, and is given up on after a few tries
        log.exception("%s cannot be sent", request_id)
        message = "the router failed; its log has more under this request id"
        return Sent("broken", error=CallError(500, "internal_error", message))
    finally:
        client.close()
    return _sent(client)


def _refused(error: CallError) -> Sent:
    verdict: Verdict = "answered"
    if error.status in (429, 503) or error.code == "hold_timeout":
        verdict = "refused"
    elif error.status >= 500:
        verdict = "broken"
    return Sent(verdict, error=error, retry_after_s=error.retry_after_s or 0.0)


def _retry_after_s(headers: Headers) -> float:
    for name, value in headers:
        if name.lower() == b"retry-after" and value.isdigit():
            return float(value[:6])
    return 0.0


class Sender:
    """Carries a plan out: each piece in a task of its own, by `work`, which keeps its result.

    `on_end` is called after each, when there may be something else to do.
    """

    def __init__(
        self, plan: Plan, work: Callable[[Item], Awaitable[Sent]], on_end: Callable[[], None]
    ) -> None:
        self.plan = plan
        self._work = work
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def pump(self) -> None:
        """Send all that may be sent now."""
        while (item := self.plan.next(self._loop.time())) is not None:
            self._tasks[item[:2]] = self._loop.create_task(self._one(item))

    def due_in_s(self) -> float | None:
        """When `pump` may have more to do although nothing ends."""
        now = self._loop.time()
        due_at = self.plan.due_at(now)
        return None if due_at is None else due_at - now

    async def call_off(self, owner: int) -> None:
        """Nothing of this owner is sent any more, and nothing of it is under way."""
        keys = self.plan.drop(owner)
        await self._cancel(keys)
        for key in keys:
            if key in self.plan.in_flight:
                self.plan.gone(key)
        self.plan.drop(owner)  # what went back just now

    async def close(self) -> None:
        """End what is under way; it is sent again by whoever runs next."""
        await self._cancel(list(self._tasks))

    async def _cancel(self, keys: list[Key]) -> None:
        tasks = [self._tasks.pop(key) for key in keys if key in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, item: Item) -> None:
        sent = Sent("refused")
        try:
            sent = await self._work(item)
        except StoreError:
            pass  # no result that is not kept: it is sent again
        except Exception:
            log.exception("%s of %s cannot be sent", item.line, item.owner)
        self._tasks.pop(item[:2], None)
        self.plan.ended(item[:2], sent.verdict, self._loop.time(), sent.retry_after_s)
        self._on_end()
