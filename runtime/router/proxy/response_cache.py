"""Answers kept to be given again: exact repeats of requests that always get the same one. Pure.

Which requests: of a model whose spec says so (`response_cache`), embeddings and their like, or
completions with temperature 0 or a seed; whole answers of status 200, streams included.

Rules this file keeps:
- a tenant gets answers to its own requests only, unless the spec shares them;
- a key holds what the engine runs with (`revision`), so that a changed model's earlier answers
  are never given;
- `Cache-Control` counts as in RFC 9111: no-store neither looks nor keeps, no-cache does not look,
  max-age does not take what is older;
- no more than `max_bytes` are kept, what was not asked for longest goes first.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from runtime.router.call.body import Head
from runtime.router.call.stream_usage import Strip
from runtime.router.call.token_meter import Meter
from runtime.wire.routes import CacheRule

ENTRY_BYTES = 1024 * 1024  # larger answers are not kept
_OVERHEAD_BYTES = 512  # of an entry, about
# Always the same for the same body.
_PURE_PATHS = frozenset(
    {
        "/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank", "/v2/embed", "/score", "/rerank",
        "/pooling", "/classify", "/tokenize", "/detokenize", "/v1/messages/count_tokens",
    }
)  # fmt: skip
_SAMPLED_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
_MAX_AGE = re.compile(rb"max-age\s*=\s*(\d{1,9})")

Key = bytes


class Wanted(NamedTuple):
    """How one request may be answered from here."""

    key: Key
    max_age_s: float  # 0: an engine must answer it


class Kept(NamedTuple):
    """One answer."""

    content_type: bytes
    body: bytes
    kept_at: float
    ttl_s: float


@dataclass(slots=True)
class Counts:
    """Of one model."""

    hits: int = 0
    misses: int = 0


def wanted(
    rule: CacheRule,
    tenant: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    head: Head,
) -> Wanted | None:
    """None: this request is none of the cache's business."""
    if path in _SAMPLED_PATHS:
        if head.temperature != 0 and type(head.seed) is not int:
            return None
    elif path not in _PURE_PATHS:
        return None
    max_age_s = rule.ttl_s
    for name, value in headers:
        if len(name) == 13 and name.lower() == b"cache-control":
            said = value.lower()
            if b"no-store" in said:
                return None
            if b"no-cache" in said:
                max_age_s = 0.0
            elif found := _MAX_AGE.search(said):
                max_age_s = min(max_age_s, float(found[1]))
    whose = "" if rule.shared else tenant
    digest = blake2b(f"{rule.revision}\0{whose}\0{path}\0".encode(), digest_size=20)
    digest.update(body)
    return Wanted(digest.digest(), max_age_s)


class ResponseCache:
    """One router's. `now` is seconds of a steady clock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self.size_bytes = 0
        self.evicted = 0
        self.counts: dict[str, Counts] = {}  # by model

    def look(self, model: str, asked: Wanted, now: float) -> Kept | None:
        """The answer, if one is kept that is young enough."""
        counts = self.counts.setdefault(model, Counts())
        kept = self._kept.get(asked.key)
        if kept is not None and now - kept.kept_at >= kept.ttl_s:
            self._drop(asked.key)
            kept = None
        if kept is None or now - kept.kept_at >= asked.max_age_s:
            counts.misses += 1
            return None
        counts.hits += 1
        self._kept.move_to_end(asked.key)
        return kept

    def keep(self, asked: Wanted, kept: Kept) -> None:
        """Give this answer from now on."""
        if len(kept.body) > min(ENTRY_BYTES, self._max_bytes - _OVERHEAD_BYTES):
            return
        self._drop(asked.key)
        self._kept[asked.key] = kept
        self.size_bytes += len(kept.body) + _OVERHEAD_BYTES
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))
            self.evicted += 1

    def _drop(self, key: Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size_bytes -= len(kept.body) + _OVERHEAD_BYTES


class Recorder(Meter):
    """A meter that keeps the answer, unless it is too large to be given again."""

    __slots__ = ("_body",)

    def __init__(self, strip: Strip | None = None) -> None:
        super().__init__(strip)
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """Take more of the answer and keep it while it is small enough."""
        given = super().feed(data)
        if self.size <= ENTRY_BYTES:
            self._body.append(given)
        else:
            self._body.clear()
        return given

    def rest(self) -> bytes:
        """Take and keep what was held back until the end."""
        given = super().rest()
        self._body.append(given)
        return given

    def body(self) -> bytes | None:
        """All of it; None: it was too large."""
        return b"".join(self._body) if self.size <= ENTRY_BYTES else None
