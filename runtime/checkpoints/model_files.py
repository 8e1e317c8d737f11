"""Models as files: where they come from, and what the cache of a node says of them.

Rules this file keeps:
- nothing is read or written here: structs, and what their text means;
- a model is named by (source, revision); a file by its sha256; both never change their content;
- a path of a file comes from others, so it is checked before it may name anything on a disk.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from msgspec import Meta, Struct

from runtime import places

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Size = Annotated[int, Meta(ge=0)]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,127})*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


class CacheConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model cache of a node."""

    limit_bytes: Annotated[
        Annotated[int, Meta(gt=0)] | None,
        Meta(description="the most the cache may hold, e.g. 500GB; none: what the disk has"),
    ] = None
    shared_dir: Annotated[
        str,
        Meta(description="a mounted store (NFS): <shared_dir>/<org>/<name>[@revision]; '': none"),
    ] = ""
    copy_shared: Annotated[
        bool, Meta(description="copy models of shared_dir to this node; false: load them from it")
    ] = True
    share_compile: Annotated[
        bool,
        Meta(
            description="share compiled code through shared_dir; whoever may write there can then"
            " run code on every node"
        ),
    ] = False


class ModelRef(Struct, frozen=True, kw_only=True):
    """A source that must be fetched: `hf:org/name@main` is (hf:org/name, main)."""

    source: str
    asked: str = ""  # the revision asked for; "" where the source has none

    @property
    def text(self) -> str:
        """As a person writes it."""
        return f"{self.source}@{self.asked}" if self.asked else self.source

    @property
    def is_name(self) -> bool:
        """Whether what is asked for, such as "main", stands for a commit that can be asked for."""
        return bool(self.asked) and not _COMMIT.fullmatch(self.asked)


def parse_ref(source: str) -> ModelRef | None:
    """The remote source that `source` names; None where it is a folder.

    Raises ValueError for a source that can't be one, whatever its kind: it names files and
    addresses.
    """
    if source.startswith("hf:"):
        name, at, revision = source.removeprefix("hf:").partition("@")
        if not _HUB_NAME.fullmatch(name):
            raise ValueError(f"{source!r} is not a hub model; write hf:org/name or hf:org/name@rev")
        if at and not _REVISION.fullmatch(revision):
            raise ValueError(
                f"{source!r} names no revision; write a branch, a tag or a commit after the @"
            )
        return ModelRef(source=f"hf:{name}", asked=revision or "main")
    if source.startswith("s3://"):
        bucket, _, prefix = source.removeprefix("s3://").strip("/").partition("/")
        if not _BUCKET.fullmatch(bucket) or not _is_plain(prefix):
            raise ValueError(f"{source!r} names no model; write s3://bucket/path/of/the/model")
        return ModelRef(source=f"s3://{bucket}/{prefix}")
    if not _is_plain("/".join(local_parts(source))):
        raise ValueError(f"{source!r} is not a plain path; write it without '..'")
    return None


def local_parts(source: str) -> tuple[str, ...]:
    """The names in the path of a folder, without what stands for the root."""
    path = PurePosixPath(source)
    return path.parts[1:] if path.is_absolute() else path.parts


def _is_plain(path: str) -> bool:
    try:
        places.below("", path)
    except places.Outside:
        return False
    return True


class ModelFile(Struct, frozen=True, kw_only=True):
    """One file of a model, by its content."""

    path: str  # below the model's folder, with '/'
    sha256: Sha256
    size_bytes: Size

    def __post_init__(self) -> None:
        check_path(self.path)  # also of what another node, or our own disk, says


class Manifest(Struct, frozen=True, kw_only=True):
    """All files of one model at one revision."""

    source: str
    revision: str  # a commit of the hub, or a digest of the listing elsewhere
    files: tuple[ModelFile, ...]

    @property
    def model_id(self) -> str:
        """The name on disk: letters, digits and '-', the same on every node."""
        return model_id(self.source, self.revision)

    @property
    def size_bytes(self) -> int:
        """The bytes of all its files together."""
        return sum(file.size_bytes for file in self.files)


def model_id(source: str, revision: str) -> str:
    """A model's name on disk: letters, digits and '-', the same on every node."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-80:]
    unique = hashlib.sha256(f"{source}@{revision}".encode()).hexdigest()[:12]
    return f"{readable}-{unique}"


def check_path(path: str) -> str:
    """`path` if it stays inside a model's folder. Raises ValueError if not."""
    if not _is_plain(path):
        raise ValueError(f"a file of the model is called {path[:200]!r}, which leaves its folder")
    return path


# ------------------------------------------------------------------------- agent -> agent


class Offer(Struct, frozen=True, kw_only=True):
    """What a node has of a model: the files it has checked, all of them if `complete`."""

    source: str
    revision: str
    complete: bool
    size_bytes: Size  # of the whole model
    files: tuple[ModelFile, ...]


# ------------------------------------------------------------------------- agent -> operators

PullState = Literal["waiting", "pulling", "ready", "failed"]


class PullView(Struct, frozen=True, kw_only=True):
    """One pull, running or lately ended."""

    model: str  # as asked for
    revision: str | None
    state: PullState
    origin: str  # where bytes come from, in words: "the hub", "peer gpu-2"
    done_bytes: Size
    total_bytes: Size | None
    rate_bytes_per_s: float
    eta_s: float | None
    age_s: float
    error: str | None = None
    error_kind: str | None = None


class CachedModel(Struct, frozen=True, kw_only=True):
    """One complete model on this node."""

    model: str
    revision: str
    model_id: str
    path: str  # the folder that an engine loads
    files: int
    size_bytes: Size
    unshared_bytes: Size  # what removing it alone would free
    idle_s: float  # since it was last asked for
    held_by: tuple[str, ...] = ()  # replicas that use it
    resident_bytes: Size = 0  # of its weights, in the page cache a few seconds ago


class CacheView(Struct, frozen=True, kw_only=True):
    """GET /agent/cache"""

    folder: str
    limit_bytes: int | None
    used_bytes: Size
    partial_bytes: Size  # parts of pulls that did not end, kept to go on from
    disk_free_bytes: Size
    models: tuple[CachedModel, ...] = ()
    pulls: tuple[PullView, ...] = ()


class PullBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /agent/cache/pull"""

    model: str
    refresh: bool = False  # ask what the revision means now, in place of the pinned commit


class VerifyReport(Struct, frozen=True, kw_only=True):
    """POST /agent/cache/verify: every file read again."""

    model: str
    revision: str
    checked_bytes: Size
    bad_files: tuple[str, ...] = ()
    removed: bool = False  # a bad model is forgotten, and pulled again when it is next wanted
    note: str = ""
