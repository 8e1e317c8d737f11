"""One inference call, and whose it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.router.body import Head
from runtime.router.versions import Tally


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as serving the call goes: whatever else a key stands for is `keys.py`'s.

    `tenant` is whom queues are fair to and caches are kept for; `priority` as in `Wish`.
    """

    tenant: str = "anonymous"
    key_id: str | None = None
    priority: int = 0


ANONYMOUS = Caller()


@dataclass(slots=True)  # frozen would cost a microsecond
class Call:
    """`path` is the engine's raw request target, `model` the caller's word, `headers` the
    caller's own, `head` what was read of the body."""

    request_id: str
    model: str
    path: str
    headers: Iterable[tuple[bytes, bytes]]
    body: bytes
    streams: bool  # the answer will be server-sent events
    head: Head
    caller: Caller = ANONYMOUS
    tally: Tally | None = None  # a route chose `model`: where its fate is counted
    spare: bool = False  # if `model` can't be had, another is tried, though comments went out
