"""The same request to a second replica when the first is slow: whoever answers first is heard.

Rules this file keeps:
- only requests that may be made twice (`HEDGED`), only where a spec says so, and only as many as
  the retry budget allows: a cluster that is slow as a whole must not get twice the load;
- the second is counted at its replica as any other, from when it is sent until it is over;
- the second one is heard only with an answer below 500: its failure is nobody's affair;
- the one that lost is cancelled: its connection closes, and its engine stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from runtime.router.admission.decisions import Forward
from runtime.router.admission.gate import Gate
from runtime.router.proxy.upstream import Reply, UpstreamError
from runtime.wire.routes import Endpoint

HEDGED = frozenset(
    {"/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank", "/score", "/rerank", "/pooling"}
)


async def first_of(
    gate: Gate, forward: Forward, post: Callable[[Endpoint], Awaitable[Reply]], after_s: float
) -> tuple[Forward, Reply, bool]:
    """The answer's head, whose it is, and whether two were asked. Raises the first one's
    UpstreamError.

    Where it is the second one's, the caller has to let its request leave.
    """
    tasks: dict[asyncio.Future[Reply], Forward] = {
        asyncio.ensure_future(post(forward.endpoint)): forward
    }
    winner: asyncio.Future[Reply] | None = None
    try:
        done, pending = await asyncio.wait(tasks, timeout=after_s)
        second = None if done else gate.hedge(forward.request_id)
        if second is not None:
            tasks[asyncio.ensure_future(post(second.endpoint))] = second
            pending = set(tasks)
        while winner is None and (done or pending):
            if not done:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task for task in done if _is_good(task, tasks[task] is forward)), None)
            done = set()
    finally:
        for task, sent in tasks.items():
            if task is not winner:
                _drop(task)
                if sent is not forward:
                    gate.leave(sent.request_id)
    if winner is None:
        error = next(iter(tasks)).exception()
        raise error if error is not None else UpstreamError("no answer came", delivered=True)
    return tasks[winner], winner.result(), len(tasks) > 1


def _is_good(task: asyncio.Future[Reply], is_first: bool) -> bool:
    if task.exception() is not None:
        return False
    return is_first or (task.result().status < 500 and task.result().status != 401)


def _drop(task: asyncio.Future[Reply]) -> None:
    if not task.done():
        task.cancel()
    elif not task.cancelled() and task.exception() is None:
        task.result().close()
