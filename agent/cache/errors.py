"""What goes wrong with models' files: each error names the thing, the place and the fix."""

from __future__ import annotations

from typing import Literal

CacheErrorKind = Literal[
    "disk_full",
    "too_big",
    "in_use",
    "not_found",
    "unauthorized",
    "corrupt",
    "unreachable",
    "bad_source",
    "cancelled",
]

PASSING = ("unreachable", "disk_full", "cancelled", "corrupt")  # another time it may go better


class CacheError(Exception):
    """A model can't be had, or can't be removed; `str()` is for people."""

    def __init__(self, kind: CacheErrorKind, words: str) -> None:
        super().__init__(words)
        self.kind: CacheErrorKind = kind


class SourceError(Exception):
    """One place that files come from failed; another may do. `kind` as in CacheError."""

    def __init__(self, kind: CacheErrorKind, words: str) -> None:
        super().__init__(words)
        self.kind: CacheErrorKind = kind
