"""How long a caller waits for a replica, as its headers say. Pure.

`Prefer: wait=30` (RFC 7240) counts for every call. The others count for calls that are not streamed
only, as one that streams is sent comments: the timeouts that OpenAI's and Anthropic's clients tell
(Python's `X-Stainless-Read-Timeout`, Node's `X-Stainless-Timeout`), and what Node's fetch waits for
the head of an answer, whatever its program asked for.

Rule this file keeps: an answer is on its way shortly before the client hangs up, not at that time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

NODE_S = 300.0  # headersTimeout of undici, which is Node's fetch
_PREFER, _RUNTIME, _AGENT = b"prefer", b"x-stainless-runtime", b"user-agent"
_TIMEOUTS = {
    b"x-stainless-timeout": "X-Stainless-Timeout",
    b"x-stainless-read-timeout": "X-Stainless-Read-Timeout",
}
_WAIT = re.compile(rb"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)
_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,6})?")
_NODE = re.compile(rb"node|undici(/.*)?", re.IGNORECASE)


class Patience(NamedTuple):
    """How long a request may wait, and that limit in words ("3s, as …")."""

    wait_s: float
    limit: str


def patience(headers: Iterable[tuple[bytes, bytes]], streams: bool) -> Patience | None:
    """None where the caller says nothing that can be understood.

    Example: `Prefer: wait=10` and a read timeout of 3.0 make 2.7 s, limited to "3s, …".
    """
    found = []
    for name, value in headers:
        lower = name.lower()
        if lower == _PREFER and (wait := _WAIT.search(value)):
            found.append(Patience(float(wait[1]), _says(float(wait[1]), "Prefer")))
        elif streams:
            continue
        elif lower in _TIMEOUTS and _SECONDS.fullmatch(value.strip()):
            seconds = float(value)
            if seconds:  # Node's clients round down: less than a second is told as 0
                found.append(Patience(_before(seconds), _says(seconds, _TIMEOUTS[lower])))
        elif lower in (_RUNTIME, _AGENT) and _NODE.fullmatch(value.strip()):
            limit = f"{NODE_S:g}s, as Node's fetch hangs up then"
            found.append(Patience(_before(NODE_S), limit))
    return min(found, default=None)


def _says(seconds: float, header: str) -> str:
    return f"{seconds:g}s, as the request's header {header} says"


def _before(seconds: float) -> float:
    """When to answer a client that hangs up after `seconds`."""
    return seconds - min(0.5, 0.1 * seconds)
