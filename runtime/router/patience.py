"""How long a caller waits for a replica, as its headers say. Pure.

`Prefer: wait=30` (RFC 7240) counts for every call; OpenAI's and Anthropic's clients tell their own
read timeout, which counts for calls that are not streamed: one that streams is sent comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PREFER, _READ_TIMEOUT = b"prefer", b"x-stainless-read-timeout"
_WAIT = re.compile(rb"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)
_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,6})?")


def patience_s(headers: Iterable[tuple[bytes, bytes]], streams: bool) -> float | None:
    """Seconds, or None where the caller says nothing that can be understood.

    Example: `Prefer: respond-async, wait=10` and a read timeout of 600.0 make 10.
    """
    found = []
    for name, value in headers:
        lower = name.lower()
        if lower == _PREFER and (wait := _WAIT.search(value)):
            found.append(float(wait[1]))
        elif lower == _READ_TIMEOUT and not streams and _SECONDS.fullmatch(value.strip()):
            found.append(float(value))
    return min(found, default=None)
