"""The model cache on disk: files by their sha256, and models as lists of them.

    blobs/<sha256>             one checked file, read-only
    models/<model_id>.json     one complete model: its manifest, and what it was asked for as;
                               its mtime is when it was last wanted
    snapshots/<model_id>/...   hard links to its blobs, under their own names: engines load this
    tmp/                       parts of pulls; what is left there is gone on from, for a day

Rules this file keeps:
- everything appears by rename, so a reader sees all of it or nothing;
- a model is listed on disk only after its files are on the disk too, not just in its cache;
- blobs that no listed model has (a pull was cut off) are used only after they are hashed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from agent.cache.policy import EvictableModel
from runtime import places
from runtime.checkpoints.model_files import Manifest, ModelFile, ModelRef

log = logging.getLogger("stoker.agent")

_KEEP_PARTS_S = 24 * 3600.0
_READ_BYTES = 2**20


class Stored(Struct, frozen=True, kw_only=True):
    """One complete model."""

    manifest: Manifest
    asked: tuple[str, ...]  # revisions asked for that mean this one, such as "main"


class CacheStore:
    """One folder. Every method may raise OSError; those that say so block for long."""

    def __init__(self, folder: Path) -> None:
        """Opens, tidies and reads what is there. Blocks.

        Raises RuntimeError where another process has it open.
        """
        self.folder = folder
        self.models: dict[str, Stored] = {}
        self._used_at: dict[str, float] = {}
        self._blobs: dict[str, int] = {}
        self._loose: set[str] = set()  # blobs of no listed model, not hashed by this process
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # of records
        for name in ("blobs", "models", "snapshots", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._locked = _lock(folder)
        self._scan()
        self.tidy()

    def close(self) -> None:
        """Let another process have it. Idempotent."""
        self._locked.close()

    # ------------------------------------------------------------------ what is there

    def _scan(self) -> None:
        for path in (self.folder / "blobs").iterdir():
            self._blobs[path.name] = path.stat().st_size
        for path in sorted((self.folder / "models").glob("*.json")):
            self._read(path)
        for path in (self.folder / "snapshots").iterdir():
            if path.name not in self.models:
                shutil.rmtree(path)
        self._loose = self._blobs.keys() - self._listed()

    def _read(self, path: Path) -> None:
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=Stored)
            model_id = stored.manifest.model_id
            for file in stored.manifest.files:
                if self._blobs.get(file.sha256) != file.size_bytes:
                    raise ValueError(f"{file.path} is missing or cut off")
                if not places.below(self.model_folder(model_id), file.path).is_file():
                    raise ValueError(f"{file.path} is not in its folder")
        except ValueError as error:
            log.warning("cached model %s is damaged and forgotten: %s", path.stem, error)
            path.unlink()
            return
        self.models[model_id] = stored
        self._used_at[model_id] = path.stat().st_mtime

    def find(self, ref: ModelRef) -> Stored | None:
        """The model that `ref` means here; the one used last where several do."""
        found = [
            s
            for s in self.models.values()
            if s.manifest.source == ref.source
            and (s.manifest.revision == ref.asked or ref.asked in s.asked)
        ]
        return max(found, key=lambda s: self._used_at[s.manifest.model_id], default=None)

    def used_at(self, model_id: str) -> float:
        """Seconds since the epoch when it was last wanted."""
        return self._used_at[model_id]

    def model_folder(self, model_id: str) -> Path:
        """The folder that an engine loads it from."""
        return places.below(self.folder, "snapshots", model_id)

    def blob(self, sha256: str) -> Path | None:
        """The checked file of that content, if it is here."""
        with self._lock:
            known = sha256 in self._blobs and sha256 not in self._loose
        return self._blob(sha256) if known else None

    def held(self) -> list[EvictableModel]:
        """Every model, for eviction."""
        return [
            EvictableModel(model_id=m, blobs=_blobs(stored.manifest), used_at=self._used_at[m])
            for m, stored in self.models.items()
        ]

    def used_bytes(self) -> int:
        """All that the cache takes, parts too."""
        with self._lock:
            return sum(self._blobs.values()) + self.partial_bytes()

    def here_bytes(self, blobs: Collection[str], parts: Collection[Path]) -> int:
        """What these take by now."""
        with self._lock:
            total = sum(self._blobs.get(blob, 0) for blob in blobs)
        return total + sum(_size(part) for part in parts)

    def partial_bytes(self) -> int:
        """Of `used_bytes`, what pulls that did not end have left."""
        return sum(_size(part) for part in self.parts())

    def parts(self) -> Iterator[Path]:
        """The files of unfinished pulls."""
        return (self.folder / "tmp").glob("*.part")

    def disk_free_bytes(self) -> int:
        """Free bytes of the cache's disk."""
        return shutil.disk_usage(self.folder).free

    # ------------------------------------------------------------------ filling it

    def part(self, ref: ModelRef, revision: str, path: str) -> Path:
        """Where the file of a model gathers until it is whole; the same in the next run."""
        name = hashlib.sha256(f"{ref.source}@{revision}/{path}".encode()).hexdigest()[:32]
        return places.below(self.folder, "tmp", f"{name}.part")

    def keep(self, part: Path, file: ModelFile) -> None:
        """Make a checked `part` a blob."""
        part.chmod(0o444)
        os.replace(part, self._blob(file.sha256))
        with self._lock:
            self._blobs[file.sha256] = file.size_bytes
            self._loose.discard(file.sha256)

    def prove(self, sha256: str) -> bool:
        """Whether the blob is here and whole; what an earlier process left is hashed."""
        if self.blob(sha256):
            return True
        path = self._blob(sha256)
        if sha256 not in self._blobs or _hash(path) != sha256:
            self._drop([sha256])
            return False
        with self._lock:
            self._loose.discard(sha256)
        return True

    def link(self, manifest: Manifest) -> None:
        """Make the snapshot of a model whose blobs are all here. Blocks."""
        target = self.model_folder(manifest.model_id)
        if target.exists():
            return
        staging = places.below(self.folder, "tmp", f"{manifest.model_id}.new")
        shutil.rmtree(staging, ignore_errors=True)
        for file in manifest.files:
            name = places.below(staging, file.path)
            name.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._blob(file.sha256), name)
        os.rename(staging, target)

    def add(self, manifest: Manifest, asked: str) -> None:
        """List a linked model, for this process; `commit` makes that last."""
        model_id = manifest.model_id
        known = self.models.get(model_id)
        names = {asked, *(known.asked if known else ())}
        self._used_at[model_id] = time.time()
        self.models[model_id] = Stored(manifest=manifest, asked=tuple(sorted(names)))
        for other, stored in list(self.models.items()):
            if other != model_id and stored.manifest.source == manifest.source:
                self._unname(other, asked)

    def _unname(self, model_id: str, asked: str) -> None:
        """A name such as "main" now means another revision."""
        stored = self.models[model_id]
        if asked in stored.asked:
            left = tuple(name for name in stored.asked if name != asked)
            self.models[model_id] = msgspec.structs.replace(stored, asked=left)
            self._write(model_id)

    def commit(self, model_id: str) -> None:
        """Make `add` outlive a power cut. Blocks until the files are on the disk."""
        try:
            if stored := self.models.get(model_id):
                for file in stored.manifest.files:
                    _sync(self._blob(file.sha256))
                self._write(model_id)
        except FileNotFoundError:
            if model_id in self.models:  # else it was removed meanwhile
                raise

    def _write(self, model_id: str) -> None:
        """One at a time: a commit in its thread and a change of names may want the same record."""
        with self._writing:
            stored = self.models.get(model_id)
            if stored is None:
                return
            new = places.below(self.folder, "tmp", f"{model_id}.json")
            new.write_bytes(msgspec.json.encode(stored))
            _sync(new)
            os.utime(new, (self._used_at.get(model_id, 0.0),) * 2)
            os.replace(new, self._record(model_id))
            if model_id not in self.models:  # `forget` came in between, with no record to remove
                self._record(model_id).unlink(missing_ok=True)

    def touch(self, model_id: str) -> None:
        """Note that a model was wanted just now."""
        self._used_at[model_id] = time.time()
        with contextlib.suppress(FileNotFoundError):  # not committed yet
            os.utime(self._record(model_id))

    # ------------------------------------------------------------------ emptying it

    def forget(self, model_id: str, kept: Collection[str]) -> list[str]:
        """Take a model off the list; `wipe` then removes it, with the blobs that this gives: those
        that neither another model nor `kept` has."""
        stored = self.models.pop(model_id)
        self._used_at.pop(model_id)
        self._record(model_id).unlink(missing_ok=True)
        return [b for b in _blobs(stored.manifest) if b not in self._listed() and b not in kept]

    def wipe(self, model_id: str, blobs: Collection[str]) -> None:
        """Remove what `forget` took off the list. Blocks."""
        shutil.rmtree(self.model_folder(model_id), ignore_errors=True)
        self._drop(blobs)

    def _listed(self) -> set[str]:
        return {f.sha256 for s in self.models.values() for f in s.manifest.files}

    def _drop(self, blobs: Collection[str]) -> None:
        with self._lock:
            for sha256 in blobs:
                self._blob(sha256).unlink(missing_ok=True)
                self._blobs.pop(sha256, None)
                self._loose.discard(sha256)

    def drop_leftovers(self, kept_parts: Collection[Path], kept: Collection[str]) -> None:
        """Remove what ended pulls left: parts, and blobs of no model. Not those of running ones."""
        for part in list(self.parts()):
            if part not in kept_parts:
                part.unlink(missing_ok=True)
        spared = self._listed() | set(kept)
        self._drop([b for b in list(self._blobs) if b not in spared])

    def tidy(self) -> None:
        """Remove what nobody went on from for a day, and half-made snapshots."""
        old = time.time() - _KEEP_PARTS_S
        for path in (self.folder / "tmp").iterdir():
            if path.suffix == ".new":
                shutil.rmtree(path)
            elif path.stat().st_mtime < old:
                path.unlink()
        blobs = self.folder / "blobs"
        self._drop([b for b in self._loose if (blobs / b).stat().st_mtime < old])

    def damaged(self, manifest: Manifest) -> list[ModelFile]:
        """The files whose bytes are not what they should be. Blocks: reads all of them."""
        found = []
        for file in manifest.files:
            try:
                whole = (
                    _hash(places.below(self.model_folder(manifest.model_id), file.path))
                    == file.sha256
                )
            except OSError:
                whole = False
            if not whole:
                found.append(file)
        return found

    def condemn(self, blobs: Iterable[str]) -> None:
        """Hash each of these blobs before it is used or served again."""
        with self._lock:
            self._loose.update(blobs)

    def _record(self, model_id: str) -> Path:
        return places.below(self.folder, "models", f"{model_id}.json")

    def _blob(self, sha256: str) -> Path:
        return places.below(self.folder, "blobs", sha256)


def _blobs(manifest: Manifest) -> dict[str, int]:
    return {file.sha256: file.size_bytes for file in manifest.files}


def _lock(folder: Path) -> IO[bytes]:
    """Held as long as it is open."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"another agent uses the model cache {folder}; give each its own agent.model_dir"
        ) from None
    return file


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
