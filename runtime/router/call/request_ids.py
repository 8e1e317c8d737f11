"""Names for calls that come without one."""

from __future__ import annotations

import itertools
import secrets


class RequestIds:
    """32 hexadecimal digits, unique among all routers: 64 random bits a process and a count."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(8)
        self._count = itertools.count(secrets.randbits(48))

    def __call__(self) -> str:
        return f"{self._prefix}{next(self._count):016x}"
