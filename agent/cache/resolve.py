"""What a model's source means on this node: a folder to use in place, or something to pull.

Rules this file keeps:
- a local folder is never copied, except from the shared store, where the config says so;
- the shared store is asked before peers and the hub; what it lacks is no error;
- for who only asks, and declares no model, a folder outside of the node's model folders is neither
  there nor missing: it is not looked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from agent.cache.errors import CacheError, SourceError
from agent.cache.sources import FolderSource, Origin
from runtime import places
from runtime.checkpoints.model_files import CacheConfig, ModelRef, local_parts, parse_ref


class Wanted(Struct, frozen=True, kw_only=True):
    """A model that must be copied to this node, and how."""

    ref: ModelRef
    direct: bool  # from its origin only: the shared store
    origin: Callable[[str | None], Origin]  # for a revision, or the one asked for
    folder: Path | None = None  # in the shared store


def look(
    source: str, config: CacheConfig, model_dir: Path, *, anywhere: bool = True
) -> Path | Wanted:
    """Blocks: looks at folders, which may be mounted ones; only below `model_dir` and the shared
    store, unless `anywhere`.

    Raises CacheError for a folder that is not there or closed to us, ValueError for a source that
    can't be one.
    """
    try:
        return _look(source, config, model_dir, anywhere)
    except PermissionError as error:
        raise CacheError(
            "unauthorized",
            f"this node's agent may not look into {error.filename!r}: let its user (uid"
            f" {os.geteuid()}) read the model's folder and enter those above it",
        ) from None


def _look(source: str, config: CacheConfig, model_dir: Path, anywhere: bool) -> Path | Wanted:
    ref = parse_ref(source)
    if ref is None and not Path(source).is_absolute():
        local = places.below(model_dir, *local_parts(source))
        if local.is_dir():
            return local.resolve()
    folder = _shared(ref, source, config.shared_dir)
    if folder is not None and folder.is_dir():
        found = FolderSource(folder, Path(config.shared_dir).absolute())
        if not config.copy_shared:
            _check_links(found)
            return folder
        wanted = ref or ModelRef(source=str(folder))
        return Wanted(ref=wanted, direct=True, origin=lambda _: found, folder=folder)
    if ref is not None:
        remote = ref
        return Wanted(ref=ref, direct=False, origin=lambda revision: open_origin(remote, revision))
    if not anywhere and not Path(source).is_relative_to(model_dir):
        raise _elsewhere(source, config, model_dir)
    if Path(source).is_dir():
        return Path(source).resolve()
    raise _missing(source, config, model_dir)


def cached_as(source: str, config: CacheConfig) -> ModelRef | None:
    """What `source` is called in the cache, if it is there. Asks no disk."""
    ref = parse_ref(source)
    folder = _shared(ref, source, config.shared_dir)
    return ref or (ModelRef(source=str(folder)) if folder else None)


def _shared(ref: ModelRef | None, source: str, shared_dir: str) -> Path | None:
    """Where the shared store would have it."""
    if not shared_dir:
        return None
    root = Path(shared_dir).absolute()
    if ref is not None:
        name = ref.source.removeprefix("hf:")
        whole = name if ref.asked == "main" else f"{name}@{ref.asked}"
        return places.below(root, whole) if ref.source.startswith("hf:") else None
    path = Path(source)
    if path.is_absolute():
        if not path.is_relative_to(root):
            return None
        path = path.relative_to(root)
    return places.below(root, *path.parts) if path.parts else None


def _check_links(folder: FolderSource) -> None:
    """Raises CacheError where a link leads out of the shared store: an engine would follow it."""
    try:
        folder.listing()
    except SourceError as error:
        raise CacheError(error.kind, str(error)) from None


def open_origin(ref: ModelRef, revision: str | None) -> Origin:
    """The hub or the object store, for one model."""
    if ref.source.startswith("hf:"):
        from agent.cache.hub import HubSource

        return HubSource(ref.source.removeprefix("hf:"), revision or ref.asked)
    from agent.cache.s3 import S3Source

    return S3Source(ref.source)


def _elsewhere(source: str, config: CacheConfig, model_dir: Path) -> CacheError:
    folders = " or ".join(filter(None, (str(model_dir), config.shared_dir)))
    return CacheError(
        "bad_source",
        f"source {source!r} is not a model in {folders}, and other folders are looked at only for a"
        " model that is declared",
    )


def _missing(source: str, config: CacheConfig, model_dir: Path) -> CacheError:
    folders = [model_dir.joinpath(source), Path(source)]
    if config.shared_dir:
        folders.insert(1, Path(config.shared_dir).joinpath(source))
    looked = " or ".join(dict.fromkeys(map(str, folders)))
    return CacheError(
        "not_found",
        f"source {source!r} is not a folder on this node (looked for {looked}); put the model"
        " there, or use hf:org/name or s3://bucket/path",
    )
