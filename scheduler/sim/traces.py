"""Who asks for what, and when: the one form that every trace is brought into. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Arrival(NamedTuple):
    """One request. `patience_s`: when its caller hangs up; None: never."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    patience_s: float | None = None
