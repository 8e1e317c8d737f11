"""Where files come from: the contract of a source, a mounted folder, and a peer.

Rules this file keeps:
- sources block and are called from many threads at once: one range of one file a call;
- a source says what it fails of in words and with a kind; whoever asked decides what then;
- a listing is what a source claims: bytes are checked by whoever writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import queue
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from msgspec import Struct

from agent.cache.errors import SourceError
from agent.cache.policy import is_wanted
from runtime import places
from runtime.checkpoints.model_files import check_path

SUMS_FILE = "SHA256SUMS"  # as sha256sum writes it: a folder may say what its files must be
_TIMEOUT_S = 20.0  # without a byte, a peer is gone


class RemoteFile(Struct, frozen=True, kw_only=True):
    """One file as a source lists it."""

    path: str
    size_bytes: int
    check: str = ""  # what it must be: "sha256:…", "git-sha1:…" or "md5:…"; "": not known
    tag: str = ""  # the source's own mark of this version

    @property
    def sha256(self) -> str | None:
        """The sha256 that the source gives for the file; None: it gives another check, or none."""
        return self.check.removeprefix("sha256:") if self.check.startswith("sha256:") else None


class Listing(Struct, frozen=True, kw_only=True):
    """All files of a model in one place, and the revision they are."""

    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


def make_listing(revision: str, files: list[RemoteFile]) -> Listing:
    """A listing of the files an engine may need; without `revision`, a digest of it is one.

    Raises SourceError for a file that would leave its folder, or no files.
    """
    try:
        safetensors = any(check_path(f.path).endswith(".safetensors") for f in files)
    except ValueError as error:
        raise SourceError("bad_source", str(error)) from None
    wanted = sorted((f for f in files if is_wanted(f.path, safetensors)), key=lambda f: f.path)
    if not wanted:
        raise SourceError("not_found", "there are no files")
    if not revision:
        text = "\n".join(f"{f.path} {f.size_bytes} {f.check} {f.tag}" for f in wanted)
        revision = hashlib.sha256(text.encode()).hexdigest()[:40]
    return Listing(revision=revision, files=tuple(wanted))


class Source(Protocol):
    """A place that files come from. Every method may raise SourceError."""

    @property
    def name(self) -> str:
        """In words: "the hub", "peer http://10.0.0.5:8082"."""
        ...

    def read_into(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `start` on."""
        ...

    def close(self) -> None:
        """End reads that are under way, and let go of connections."""
        ...


class Origin(Source, Protocol):
    """A source that knows what a model consists of."""

    def listing(self) -> Listing:
        """The files that the model consists of."""


class FolderSource:
    """A model in a mounted folder, below the store `root`: no link out of that is followed."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.name = f"the folder {folder}"
        self._folder = folder
        self._root = root
        self._below = folder.relative_to(root).as_posix()
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def listing(self) -> Listing:
        """The files of the folder."""
        sums = self._sums()
        try:
            files = [self._file(path, sums) for path in self._paths()]
        except OSError as error:
            raise self._failed(error) from None
        return make_listing("", files)

    def _paths(self) -> Iterator[str]:
        """Each file's path below the folder. A folder that links meet twice is read once."""
        seen = set()
        for folder, folders, names in os.walk(self._folder, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = [] if real in seen else sorted(n for n in folders if n[0] != ".")
            below = Path(folder).relative_to(self._folder)
            yield from (
                ()
                if real in seen
                else ((below / name).as_posix() for name in sorted(names) if name != SUMS_FILE)
            )
            seen.add(real)

    def _file(self, name: str, sums: dict[str, str]) -> RemoteFile:
        file = self._opened(name)
        try:
            found = os.fstat(file)
        finally:
            os.close(file)
        if not stat.S_ISREG(found.st_mode):
            raise SourceError("bad_source", f"{self.name}: {name} is not a plain file; remove it")
        check = f"sha256:{sums[name]}" if name in sums else ""
        return RemoteFile(
            path=name, size_bytes=found.st_size, check=check, tag=str(found.st_mtime_ns)
        )

    def _sums(self) -> dict[str, str]:
        try:
            with os.fdopen(self._opened(SUMS_FILE), encoding="utf-8") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._failed(error) from None
        except UnicodeDecodeError:
            raise SourceError("bad_source", f"{self.name}: {SUMS_FILE} is not text") from None
        pairs = (line.split(maxsplit=1) for line in lines if line.strip())
        return {name.lstrip("*").removeprefix("./"): sha.lower() for sha, name in pairs}

    def read_into(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `start` on."""
        try:
            fd = self._fd(file.path)
            done = 0
            while done < len(view):
                got = os.preadv(fd, [view[done:]], start + done)
                if not got:
                    raise SourceError(
                        "corrupt",
                        f"{self.name}: {file.path} ended after {start + done} of"
                        f" {file.size_bytes} bytes; is it still being written there?",
                    )
                done += got
        except OSError as error:
            raise self._failed(error) from None

    def _fd(self, path: str) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = self._opened(path)
            return self._open[path]

    def _opened(self, path: str) -> int:
        try:
            return places.open_inside(self._root, self._below, path)
        except places.Outside as error:
            raise SourceError("bad_source", f"{error}; put the file itself there") from None

    def _failed(self, error: OSError) -> SourceError:
        return SourceError(
            "unreachable", f"{self.name} can't be read: {error}; is the store mounted?"
        )

    def close(self) -> None:
        """Close the open files."""
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()


class PeerSource:
    """Another agent, which serves checked files by their sha256."""

    def __init__(self, url: str, token: str) -> None:
        """`url` is the agent's base URL."""
        self.name = f"peer {url}"
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        self._all: set[http.client.HTTPConnection] = set()
        self._closed = False

    def read_into(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill `view` with the blob's bytes from `start` on."""
        connection, reused = self._connection()
        try:
            try:
                self._get(connection, file, start, view)
            except (OSError, http.client.HTTPException):
                if not reused or self._closed:
                    raise
                connection.close()  # the peer may have ended it while it was idle; it reconnects
                self._get(connection, file, start, view)
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            raise SourceError(
                "unreachable",
                f"{self.name} stopped answering in {file.path} after {start} of"
                f" {file.size_bytes} bytes ({type(error).__name__}: {error})",
            ) from None
        except SourceError:
            self._drop(connection)
            raise
        self._idle.put(connection)

    def _get(
        self, connection: http.client.HTTPConnection, file: RemoteFile, start: int, view: memoryview
    ) -> None:
        wanted = {"Range": f"bytes={start}-{start + len(view) - 1}"}
        path = places.url("", "agent", "cache", "blobs", str(file.sha256))
        connection.request("GET", path, headers=self._headers | wanted)
        response = connection.getresponse()
        if response.status != 206 or response.length != len(view):
            raise self._refused(response, file)
        done = 0
        while done < len(view):
            got = response.readinto(view[done:])
            if not got:
                raise ConnectionError("the connection was closed")
            done += got
        response.close()

    def _refused(self, response: http.client.HTTPResponse, file: RemoteFile) -> SourceError:
        if response.status in (401, 403):
            return SourceError(
                "unauthorized",
                f"{self.name} refused the cluster token; set the same cluster_token on every node",
            )
        if response.status in (404, 416):
            return SourceError("not_found", f"{self.name} no longer has {file.path}")
        return SourceError("unreachable", f"{self.name} answered {response.status} for {file.path}")

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """One of its own for this thread, and whether it was used before."""
        if self._closed:
            raise SourceError("cancelled", f"{self.name} is no longer asked")
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait(), True
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        self._all.add(connection)
        return connection, False

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        self._all.discard(connection)
        connection.close()

    def close(self) -> None:
        """End reads that are under way, and let go of connections."""
        self._closed = True
        for connection in list(self._all):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
        while not self._idle.empty():
            self._drop(self._idle.get_nowait())
