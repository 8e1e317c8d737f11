"""The registry for a single host: one SQLite file that every part opens for itself.

Rules this file keeps:
- every version comes from one counter in the file, so it grows across deletes and across keys;
- a change to *who* is registered moves that name's version, a keep-alive does not: blocking reads
  wake for changes only;
- SQLite runs on one worker thread per registry, never on the event loop;
- the file is built complete elsewhere and then linked into place: nobody ever sees half of it;
- values survive a power cut (synchronous FULL); registrations and locks need not, since whoever
  held them is gone as well: so a slow disk does not cost a leader its lock.

Ages use the wall clock, the one clock that all processes share: a step of it shortens or lengthens
the registrations and locks of that moment, nothing else. SQLite's shared memory does not work
across hosts: keep the file on a local disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from runtime.registry.protocol import Entry, RegistryError, Service

POLL_S = 0.05  # between two looks of a blocking read
BUSY_S = 5.0  # how long to wait for another process's write
FORMAT = 1  # PRAGMA user_version

_SCHEMA = """
CREATE TABLE counter (version INTEGER NOT NULL);
INSERT INTO counter VALUES (1);
-- A deleted key keeps its row with a NULL value, so that its version is not forgotten.
CREATE TABLE kv (
    key TEXT PRIMARY KEY, version INTEGER NOT NULL, lock_id TEXT, lock_expires REAL, value BLOB
);
CREATE TABLE services (
    service_id TEXT PRIMARY KEY, name TEXT NOT NULL, ttl_s REAL NOT NULL, expires REAL NOT NULL,
    record BLOB NOT NULL
);
CREATE INDEX services_by_name ON services (name);
CREATE INDEX services_by_expiry ON services (expires);
-- The version at which the set of services of a name last changed.
CREATE TABLE names (name TEXT PRIMARY KEY, version INTEGER NOT NULL);
"""
_BELOW = "key >= :prefix AND key < :prefix || char(1114111)"  # 1114111: the last code point

T = TypeVar("T")


class _Run(Protocol):
    """Runs `work` on the registry's worker thread; failures are RegistryErrors."""

    async def __call__(self, what: str, work: Callable[[sqlite3.Connection], T]) -> T: ...


class EmbeddedRegistry:
    """A Registry over the SQLite file `path`, made (0600) with the first call."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._db: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._closed = False

    async def register(self, service: Service, ttl_s: float) -> None:
        """Register a service, which counts as alive for `ttl_s`."""
        await self._run(f"register {service.service_id}", lambda db: _register(db, service, ttl_s))

    async def keep_alive(self, service_id: str) -> bool:
        """Extend a service's time by its TTL; False: it has expired."""
        return await self._run(f"keep {service_id} alive", lambda db: _keep_alive(db, service_id))

    async def deregister(self, service_id: str) -> None:
        """Remove a service."""
        await self._run(f"deregister {service_id}", lambda db: _deregister(db, service_id))

    async def services(
        self, name: str, index: int = 0, wait_s: float = 0.0
    ) -> tuple[tuple[Service, ...], int]:
        """The living services of that name, and the index to wait from next."""

        def index_of(db: sqlite3.Connection) -> int:
            _expire_services(db)
            return _one(db, "SELECT version FROM names WHERE name = ?", (name,)) or 1

        def rows(db: sqlite3.Connection) -> tuple[Service, ...]:
            query = "SELECT record FROM services WHERE name = ? ORDER BY service_id"
            found = db.execute(query, (name,)).fetchall()
            return tuple(msgspec.json.decode(record, type=Service) for (record,) in found)

        return await self._watch(f"list the services {name}", index_of, rows, index, wait_s)

    async def get(self, key: str) -> Entry | None:
        """The value of a key; None: the key has none."""

        def read(db: sqlite3.Connection) -> Entry | None:
            query = "SELECT value, version FROM kv WHERE key = ? AND value IS NOT NULL"
            row = db.execute(query, (key,)).fetchone()
            return Entry(key=key, value=row[0], version=row[1]) if row else None

        return await self._run(f"get {key}", read)

    async def list(
        self, prefix: str, index: int = 0, wait_s: float = 0.0
    ) -> tuple[tuple[Entry, ...], int]:
        """The values below a prefix, by key, and the index to wait from next."""
        bound = {"prefix": prefix}

        def index_of(db: sqlite3.Connection) -> int:
            return _one(db, f"SELECT max(version) FROM kv WHERE {_BELOW}", bound) or 1

        def rows(db: sqlite3.Connection) -> tuple[Entry, ...]:
            found = db.execute(
                f"SELECT key, value, version FROM kv WHERE {_BELOW} AND value IS NOT NULL"
                " ORDER BY key",
                bound,
            )
            return tuple(Entry(key=key, value=value, version=v) for key, value, v in found)

        return await self._watch(f"list {prefix}", index_of, rows, index, wait_s)

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        """Write a value, with `version` only where the key has that still; whether it did."""
        return await self._run(f"put {key}", lambda db: _put(db, key, value, version))

    async def delete(self, key: str, version: int | None = None) -> bool:
        """Delete a key, with `version` only where the key still has that; whether it is gone."""
        return await self._run(f"delete {key}", lambda db: _delete(db, key, version))

    async def acquire(self, key: str, holder: bytes, ttl_s: float) -> EmbeddedLock | None:
        """Take the lock of `key`; None: somebody else has it."""
        lock = EmbeddedLock(self._run, key, ttl_s)
        taken = await self._run(f"lock {key}", lambda db: lock.take(db, holder))
        return lock if taken else None

    async def open_to(self, key: str) -> str | None:
        """Who else may write the file, with the fix; None: nobody."""
        for path in (self._path, self._path.parent):
            with contextlib.suppress(OSError):  # it is made with the first call
                if path.stat().st_mode & stat.S_IWOTH:
                    return f"other users of this host: {path} is open to them (chmod o-w)"
        return None

    async def close(self) -> None:
        """Close the file and end its thread."""
        self._closed = True
        with contextlib.suppress(RuntimeError):  # closed twice
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def _watch(
        self,
        what: str,
        index_of: Callable[[sqlite3.Connection], int],
        rows: Callable[[sqlite3.Connection], T],
        index: int,
        wait_s: float,
    ) -> tuple[T, int]:
        """The rows and their index, once it is not `index` any more or after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            current = await self._run(what, index_of)
            left_s = deadline - time.monotonic()
            if index == 0 or current != index or left_s <= 0:
                # Read after the index: a write between the two wakes the caller once too often
                # instead of being missed.
                return await self._run(what, rows), current
            await asyncio.sleep(min(POLL_S, left_s))

    async def _run(self, what: str, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise RegistryError(f"registry {self._path}: cannot {what}: it is closed")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, lambda: work(self._connection()))
        except (sqlite3.Error, msgspec.MsgspecError, OSError) as error:
            message = f"registry {self._path}: cannot {what}: {error}; {_fix(error)}"
            raise RegistryError(message) from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            if not self._path.exists():
                _create(self._path)
            self._db = _open(self._path)
        return self._db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


class EmbeddedLock:
    """A Lock over one row of `kv`."""

    def __init__(self, run: _Run, key: str, ttl_s: float) -> None:
        self._run = run
        self._key = key
        self._ttl_s = ttl_s
        self._id = uuid.uuid4().hex
        self._expires = 0.0
        self._over = False  # lost or released: a renewal still on its way changes nothing

    @property
    def held(self) -> bool:
        """Whether the lock is surely ours still."""
        return not self._over and time.time() < self._expires

    async def renew(self) -> bool:
        """Extend the lock by its TTL; whether it is still held."""
        if not await self._run(f"renew the lock {self._key}", self._renew):
            self._over = True
        return self.held

    async def release(self) -> None:
        """Give the lock up."""
        self._over = True
        await self._run(f"release the lock {self._key}", self._release)

    def take(self, db: sqlite3.Connection, holder: bytes) -> bool:
        """On the worker thread: True if the lock is now ours."""
        with _write(db):
            now = time.time()
            query = "SELECT 1 FROM kv WHERE key = ? AND lock_id IS NOT NULL AND lock_expires > ?"
            if _one(db, query, (self._key, now)):
                return False
            _set(db, self._key, holder)
            query = "UPDATE kv SET lock_id = ?, lock_expires = ? WHERE key = ?"
            db.execute(query, (self._id, now + self._ttl_s, self._key))
        self._expires = now + self._ttl_s
        return True

    def _renew(self, db: sqlite3.Connection) -> bool:
        with _write(db):
            now = time.time()
            changed = db.execute(
                "UPDATE kv SET lock_expires = ? WHERE key = ? AND lock_id = ? AND lock_expires > ?",
                (now + self._ttl_s, self._key, self._id, now),
            ).rowcount
        if changed:
            self._expires = now + self._ttl_s
        return changed == 1

    def _release(self, db: sqlite3.Connection) -> None:
        with _write(db):
            db.execute(
                "UPDATE kv SET lock_id = NULL, version = ? WHERE key = ? AND lock_id = ?",
                (_next_version(db), self._key, self._id),
            )


# ------------------------------------------------------------------------ on the worker thread


def _fix(error: Exception) -> str:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return f"another process has held it for {BUSY_S:g} s: is one stopped, or the disk stuck?"
    if isinstance(error, sqlite3.OperationalError | OSError):
        return "set registry.file to one this user can write, on a local disk with free space"
    return "stop every part, move the file away and start again; models must be added again"


def _create(path: Path) -> None:
    """Build the file under another name and link it into place, unless another was quicker.

    Not opened here under its own name: closing such a descriptor would drop the locks that another
    connection of this process holds on the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        found = _one(db, "PRAGMA user_version", ())
        if found != FORMAT:
            raise sqlite3.DatabaseError(f"its format is {found}, this Stoker knows {FORMAT}")
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def _write(db: sqlite3.Connection, durable: bool = False) -> Iterator[None]:
    """One transaction that no other process's can interleave with."""
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _one(db: sqlite3.Connection, query: str, bound: tuple[object, ...] | dict[str, str]) -> int:
    """The first column of the first row, 0 where there is none or it is NULL."""
    row = db.execute(query, bound).fetchone()
    return row[0] or 0 if row else 0


def _next_version(db: sqlite3.Connection) -> int:
    db.execute("UPDATE counter SET version = version + 1")
    return _one(db, "SELECT version FROM counter", ())


def _set(db: sqlite3.Connection, key: str, value: bytes | None) -> None:
    db.execute(
        "INSERT INTO kv (key, version, value) VALUES (?, ?, ?)"
        " ON CONFLICT (key) DO UPDATE SET version = excluded.version, value = excluded.value",
        (key, _next_version(db), value),
    )


def _version(db: sqlite3.Connection, key: str) -> int:
    return _one(db, "SELECT version FROM kv WHERE key = ? AND value IS NOT NULL", (key,))


def _put(db: sqlite3.Connection, key: str, value: bytes, version: int | None) -> bool:
    with _write(db, durable=True):
        if version is not None and _version(db, key) != version:
            return False
        _set(db, key, value)
    return True


def _delete(db: sqlite3.Connection, key: str, version: int | None) -> bool:
    with _write(db, durable=True):
        current = _version(db, key)
        if version is not None and current != version:
            return False
        if current:
            _set(db, key, None)
            db.execute("UPDATE kv SET lock_id = NULL WHERE key = ?", (key,))
    return True


def _changed(db: sqlite3.Connection, name: str) -> None:
    """Note that the set of services of that name is another one now."""
    db.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, _next_version(db)))


def _register(db: sqlite3.Connection, service: Service, ttl_s: float) -> None:
    record = msgspec.json.encode(service)
    with _write(db):
        now = time.time()
        query = "SELECT name, record FROM services WHERE service_id = ?"
        before = db.execute(query, (service.service_id,)).fetchone()
        db.execute(
            "INSERT OR REPLACE INTO services VALUES (?, ?, ?, ?, ?)",
            (service.service_id, service.name, ttl_s, now + ttl_s, record),
        )
        if before != (service.name, record):
            for name in {service.name, before[0] if before else service.name}:
                _changed(db, name)


def _keep_alive(db: sqlite3.Connection, service_id: str) -> bool:
    with _write(db):
        now = time.time()
        query = "UPDATE services SET expires = ? + ttl_s WHERE service_id = ? AND expires > ?"
        return db.execute(query, (now, service_id, now)).rowcount == 1


def _deregister(db: sqlite3.Connection, service_id: str) -> None:
    with _write(db):
        _remove(db, "service_id = ?", service_id)


def _expire_services(db: sqlite3.Connection) -> None:
    """Remove what was not kept alive, so that its name's version moves for everybody."""
    now = time.time()
    if _one(db, "SELECT 1 FROM services WHERE expires <= ? LIMIT 1", (now,)):
        with _write(db):
            _remove(db, "expires <= ?", now)


def _remove(db: sqlite3.Connection, condition: str, bound: str | float) -> None:
    names = db.execute(f"SELECT DISTINCT name FROM services WHERE {condition}", (bound,)).fetchall()
    db.execute(f"DELETE FROM services WHERE {condition}", (bound,))
    for (name,) in names:
        _changed(db, name)
