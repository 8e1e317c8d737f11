"""Shares what vLLM compiled with nodes that have not, through the shared store.

    <shared_dir>/.compiled/<key>.json         what was compiled, and the archive's sha256
    <shared_dir>/.compiled/<sha256>.tar.gz    the files, relative to the node's cache_dir

The key is made of all that the compiled code depends on, as far as it can be told before a start;
vLLM's own key is inside of it, so that an archive of something else is only of no use.

Rules this file keeps:
- every call blocks; an error is OSError, or Unsafe for an archive that is not what it should be;
- an archive is hashed before it is opened; it may hold plain files and folders below the three
  cache folders, and nothing else: no links, no absolute names, no `..`;
- a file that is there is never replaced; everything appears by rename;
- whoever may write to the shared store can run code on the nodes: it is compiled code. So it is off
  by default (`cache.share_compile`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec
from msgspec import Struct

from runtime import outside, places
from runtime.checkpoints.model_files import Sha256, Size

FOLDER = ".compiled"
_KNOWN = "compiled"  # of the cache_dir: keys that were fetched or shared already
_PARTS = ("vllm/torch_compile_cache", "inductor", "triton")  # of the cache_dir
_MOST_BYTES = 4 * 2**30
_READ_BYTES = 2**20
_MOST_ENTRY_BYTES = 2**20
_VERSION_TIMEOUT_S = 60.0
_TORCH_VERSION = "import importlib.metadata as m; print(m.version('torch'))"


class Unsafe(Exception):
    """An archive that is not used; the message says why."""


class Compiled(Struct, frozen=True, kw_only=True):
    """What compiled code depends on."""

    source: str
    model_path: str  # vLLM's own key has it
    engine_args: dict[str, object]
    tensor_parallel_size: int
    vllm: str
    torch: str
    python: str
    device: str  # its name; compute capability or machine
    env: dict[str, str] = {}

    @property
    def key(self) -> str:
        """The same on every node for the same things."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]


class Entry(Struct, frozen=True, kw_only=True):
    """<key>.json"""

    compiled: Compiled
    sha256: Sha256
    size_bytes: Size


class CompileStore:
    """The shared side, and this node's cache_dir."""

    def __init__(self, shared_dir: Path, cache_dir: Path) -> None:
        self._shared = shared_dir / FOLDER
        self._cache_dir = cache_dir

    def has(self, key: str) -> bool:
        """Whether somebody shared it."""
        return self._entry_path(key).is_file()

    def fetch(self, key: str) -> int | None:
        """Bring what was shared, once; the files that were new here, None where nothing was shared.

        Raises Unsafe, OSError.
        """
        if places.below(self._cache_dir, _KNOWN, key).exists():
            return 0
        try:
            with self._opened(f"{key}.json") as file:
                entry = outside.decode(file.read(_MOST_ENTRY_BYTES), Entry)
        except FileNotFoundError:
            return None
        except places.Outside as error:
            raise Unsafe(str(error)) from None
        except ValueError as error:
            raise Unsafe(f"{self._entry_path(key)} is damaged: {error}") from None
        with self._folder() as folder:
            archive = folder / "archive"
            self._copy(entry, archive)
            files = folder / "files"
            unpack(archive, files)
            new = self._settle(files)
        self._know(key)
        return new

    def push(self, compiled: Compiled, log_text: str, since: float) -> int | None:
        """Share what a start compiled; the archive's bytes, None if it compiled nothing new.

        `log_text`: of the engine, which names vLLM's folders; `since`: when the start began, in
        seconds since the epoch. Raises OSError.
        """
        folders = self._named(log_text)
        fresh = [p for p in self._files(folders) if p.stat().st_ctime >= since]
        if not any(folder in path.parents for folder in folders for path in fresh):
            return None
        if not self._shared.is_dir():
            self._shared.mkdir(parents=True, exist_ok=True)
            self._shared.chmod(0o755)  # for other nodes, whatever this process's umask is
        handle, name = tempfile.mkstemp(prefix=".new-", dir=self._shared)
        os.close(handle)
        part = Path(name)
        try:
            with tarfile.open(part, "w:gz", compresslevel=1) as tar:
                for path in fresh:
                    with contextlib.suppress(FileNotFoundError):  # a lock, a temporary file
                        tar.add(path, str(path.relative_to(self._cache_dir)), recursive=False)
            part.chmod(0o644)
            entry = Entry(compiled=compiled, sha256=_hash(part), size_bytes=part.stat().st_size)
            part.replace(self._archive_path(entry.sha256))
        finally:
            part.unlink(missing_ok=True)
        _write(self._entry_path(compiled.key), msgspec.json.encode(entry))
        self._know(compiled.key)
        return entry.size_bytes

    def _know(self, key: str) -> None:
        folder = self._cache_dir / _KNOWN
        folder.mkdir(exist_ok=True)
        places.below(folder, key).touch()

    def _named(self, log_text: str) -> list[Path]:
        """vLLM's folders that the log speaks of."""
        root = self._cache_dir / _PARTS[0]
        names = re.findall(
            rf"{re.escape(str(root))}/((?:torch_aot_compile/)?[0-9a-f]{{6,64}})\b", log_text
        )
        return [places.below(root, name) for name in dict.fromkeys(names)]

    def _files(self, folders: list[Path]) -> Iterator[Path]:
        for folder in [*folders, *(places.below(self._cache_dir, part) for part in _PARTS[1:])]:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.suffix != ".lock" and self._is_own(path):
                    yield path

    def _is_own(self, path: Path) -> bool:
        """Whether no link leads to it: an engine may have left one to anything it can read."""
        return path.resolve() == self._cache_dir.resolve() / path.relative_to(self._cache_dir)

    def _copy(self, entry: Entry, target: Path) -> None:
        if entry.size_bytes > _MOST_BYTES:
            raise Unsafe(f"the archive of {entry.sha256} has {entry.size_bytes} bytes")
        source = self._archive_path(entry.sha256)
        try:
            with self._opened(source.name) as file, target.open("wb") as copy:
                if os.fstat(file.fileno()).st_size != entry.size_bytes:
                    raise Unsafe(f"{source} does not have the size that its entry says")
                shutil.copyfileobj(file, copy, _READ_BYTES)
        except FileNotFoundError:
            raise Unsafe(f"{source} is missing") from None
        except places.Outside as error:
            raise Unsafe(str(error)) from None
        if _hash(target) != entry.sha256:
            raise Unsafe(f"{source} does not have the content that its name says")

    def _settle(self, files: Path) -> int:
        new = 0
        for path in sorted(p for p in files.rglob("*") if p.is_file()):
            try:
                target = places.inside(self._cache_dir, path.relative_to(files).as_posix())
            except places.Outside as error:
                raise Unsafe(str(error)) from None
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                path.rename(target)
                new += 1
        return new

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """Empty, on the file system of the cache_dir, and gone afterwards."""
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".compiled-", dir=self._cache_dir) as name:
            yield Path(name)

    def _entry_path(self, key: str) -> Path:
        return places.below(self._shared, f"{key}.json")

    def _archive_path(self, sha256: str) -> Path:
        return places.below(self._shared, f"{sha256}.tar.gz")

    def _opened(self, name: str) -> IO[bytes]:
        return os.fdopen(places.open_inside(self._shared, name), "rb")


def unpack(archive: Path, target: Path) -> None:
    """All files of it below `target`. Raises OSError, or Unsafe before a byte is written."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()
            for member in members:
                _check(member)
            if sum(member.size for member in members) > _MOST_BYTES:
                raise Unsafe(f"{archive.name} holds more than {_MOST_BYTES} bytes")
            tar.extractall(target, members, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise Unsafe(f"{archive.name} can't be read: {error}") from None


def _check(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()):
        raise Unsafe(f"{member.name!r} is neither a file nor a folder")
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise Unsafe(f"{member.name!r} leaves the cache")
    if not any(path.is_relative_to(part) for part in _PARTS):
        raise Unsafe(f"{member.name!r} is in none of {', '.join(_PARTS)}")


def torch_version(python: str) -> str | None:
    """Of that interpreter; None if it has none. Torch is not imported. Blocks."""
    try:
        # In "/", since `-c` puts the cwd first on sys.path.
        done = subprocess.run(
            [python, "-c", _TORCH_VERSION],
            cwd="/", capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)  # a name nobody can guess
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)
