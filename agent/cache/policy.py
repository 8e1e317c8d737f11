"""What the model cache decides: what is evicted, who is asked for what, how long it will take.
Pure.

Rules this file keeps:
- pure: no I/O, no clock, no random; `now` is passed in;
- a file that a replica or a pull uses is never given up, and nothing is given up in vain;
- the origin (hub, object store) is asked only by the node that holds the model's lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from runtime.checkpoints.model_files import ModelFile, Offer

# ------------------------------------------------------------------------------ eviction


class EvictableModel(Struct, frozen=True, kw_only=True):
    """One cached model, as eviction sees it."""

    model_id: str
    blobs: Mapping[str, int]  # sha256 -> bytes
    used_at: float  # when it was last asked for


def shortage_bytes(
    *, need_bytes: int, used_bytes: int, limit_bytes: int | None, disk_free_bytes: int
) -> int:
    """How much must go before `need_bytes` more can be kept."""
    over_limit = used_bytes + need_bytes - limit_bytes if limit_bytes is not None else 0
    return max(0, over_limit, need_bytes - disk_free_bytes)


def freed_bytes(
    gone: Collection[str], models: Iterable[EvictableModel], kept: Collection[str]
) -> int:
    """What removing the models `gone` frees: files that no other model and no `kept` one needs."""
    needed = set(kept)
    freed: dict[str, int] = {}
    for model in models:
        if model.model_id in gone:
            freed.update(model.blobs)
        else:
            needed.update(model.blobs)
    return sum(size for blob, size in freed.items() if blob not in needed)


def victims(
    models: Sequence[EvictableModel],
    in_use: Collection[str],
    kept: Collection[str],
    shortage: int,
) -> list[str] | None:
    """The models to remove so that `shortage` bytes get free, least recently used first.

    None where even removing every model that is not `in_use` would not do. `kept` are blobs that
    running pulls count on. No victim can be left out of the answer: each is needed.
    """
    if shortage <= 0:
        return []
    order = sorted(models, key=lambda m: (m.used_at, m.model_id))
    chosen: list[str] = []
    for model in order:
        if model.model_id in in_use:
            continue
        chosen.append(model.model_id)
        if freed_bytes(chosen, models, kept) >= shortage:
            break
    else:
        return None
    for model_id in reversed(chosen[:]):  # spare what turned out not to be needed, newest first
        fewer = [m for m in chosen if m != model_id]
        if freed_bytes(fewer, models, kept) >= shortage:
            chosen = fewer
    return chosen


# ------------------------------------------------------------------------------ who is asked


class PeerOffer(Struct, frozen=True, kw_only=True):
    """One peer's answer."""

    url: str
    offer: Offer


class FromPeers(Struct, frozen=True):
    """Take these files, each from any of its peers."""

    files: tuple[tuple[ModelFile, tuple[str, ...]], ...]  # file, urls


class FromOrigin(Struct, frozen=True):
    """Ask the hub or the object store."""


class TryLease(Struct, frozen=True):
    """Nobody offers what is missing: ask to be the one that asks the origin."""


class Wait(Struct, frozen=True):
    """Another node asks the origin; its files will be offered."""


class Complete(Struct, frozen=True):
    """Nothing is missing."""

    offer: Offer


Step = FromPeers | FromOrigin | TryLease | Wait | Complete
LeaseState = Literal["none", "mine", "other", "unknown"]


def next_step(have: Collection[str], offers: Sequence[PeerOffer], lease: LeaseState) -> Step:
    """What a node does next to get a model of which it has the blobs `have`.

    `lease` is "unknown" where the registry can't be asked: then the origin is asked without one,
    since a model that starts twice as dear is better than one that does not start.
    """
    complete = next((o.offer for o in offers if o.offer.complete), None)
    if complete and all(file.sha256 in have for file in complete.files):
        return Complete(complete)
    files = _offered(have, offers, complete.revision if complete else None)
    if files:
        return FromPeers(tuple(files))
    if lease in ("mine", "unknown"):
        return FromOrigin()
    return Wait() if lease == "other" else TryLease()


def _offered(
    have: Collection[str], offers: Sequence[PeerOffer], revision: str | None
) -> list[tuple[ModelFile, tuple[str, ...]]]:
    """Each missing file of one revision (the complete one's if given), with who has it."""
    revision = revision or (offers[0].offer.revision if offers else None)
    found: dict[str, tuple[ModelFile, list[str]]] = {}
    for peer in offers:
        if peer.offer.revision != revision:
            continue
        for file in peer.offer.files:
            if file.sha256 not in have:
                found.setdefault(file.sha256, (file, []))[1].append(peer.url)
    return [(file, tuple(dict.fromkeys(urls))) for file, urls in found.values()]


def pick_source(chunk: int, names: Sequence[str], failed: Collection[str]) -> str | None:
    """Which of `names` serves the file's `chunk`-th range: in turn, without those that failed."""
    alive = [name for name in names if name not in failed]
    return alive[chunk % len(alive)] if alive else None


# ------------------------------------------------------------------------------ what is wanted

_OTHER_WEIGHTS = (".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite", ".onnx_data")
_OTHER_FOLDERS = ("original/", "onnx/", "openvino/", "coreml/", "metal/")


def is_wanted(path: str, has_safetensors: bool) -> bool:
    """Whether an engine may need the file.

    Repositories of the hub often hold the same weights in several formats: where there are
    safetensors, which vLLM prefers, the others are left there.
    """
    if path.startswith(".git"):
        return False
    if not has_safetensors:
        return True
    old = path.startswith("pytorch_model") and path.endswith((".bin", ".bin.index.json"))
    return not (old or path.endswith(_OTHER_WEIGHTS) or path.startswith(_OTHER_FOLDERS))


# ------------------------------------------------------------------------------ how fast


class Rate:
    """Bytes per second over the last `window_s`, and what is left at that rate."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def seen(self, now: float, done_bytes: int) -> None:
        """`done_bytes` in all were there at `now`."""
        self._seen.append((now, done_bytes))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window_s:
            self._seen.popleft()

    def bytes_per_s(self) -> float:
        """The rate over the window; 0 before two measurements."""
        if len(self._seen) < 2:
            return 0.0
        (then, before), (now, done) = self._seen[0], self._seen[-1]
        return max(0.0, (done - before) / (now - then)) if now > then else 0.0

    def eta_s(self, left_bytes: int) -> float | None:
        """None while nothing moves."""
        rate = self.bytes_per_s()
        return left_bytes / rate if rate > 0 else None
