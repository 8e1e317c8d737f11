"""What outlives a request: one SQLite file a host, `<state_dir>/jobs.db`.

Rules this file keeps:
- only it and the `*_rows.py` beside it know SQL;
- SQLite runs on one thread, never on the event loop; each call is one short transaction;
- what a caller was told is on the disk before it is told (WAL, synchronous FULL);
- contents lie in the same file, so that one transaction makes or removes a thing whole, one figure
  says how much is used, and a crash leaves nothing behind that no row names.

All workers of a host open the file, each for itself. SQLite's shared memory does not work across
hosts: keep it on a local disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from runtime.router.call.errors import CallError
from runtime.router.jobs.store import held_rows

log = logging.getLogger("stoker.router.jobs")

BUSY_S = 5.0  # how long to wait for another process's write
# How much of its share a tenant may hold with the results of what was taken in. Bodies of jobs that
# wait count too: if these stopped at the share itself, they could never make room.
RESULTS_FACTOR = 1.5
_SHRUNK_PAGES = 2000  # in one transaction: 8 MB
FORMAT = 2  # PRAGMA user_version: raised only where an older release could not work with the file

_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    created_at REAL NOT NULL, expires_at REAL NOT NULL, batch INTEGER, outcome INTEGER,
    whole INTEGER NOT NULL, key_id TEXT
);
CREATE TABLE chunks (file INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL);
CREATE UNIQUE INDEX chunks_in_order ON chunks (file, number);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    key_id TEXT, endpoint TEXT NOT NULL, input INTEGER NOT NULL, input_id TEXT NOT NULL,
    metadata TEXT, created_at REAL NOT NULL, expires_at REAL NOT NULL, keep_s REAL NOT NULL,
    webhook TEXT, status TEXT NOT NULL, stamps TEXT NOT NULL DEFAULT '{}', errors TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, output_id TEXT, error_id TEXT, ended_at REAL
);
CREATE INDEX batches_unfinished ON batches (tenant, seq) WHERE ended_at IS NULL;
-- An output file is no copy: it is the results of one outcome, read in order.
CREATE TABLE lines (
    batch INTEGER NOT NULL, line INTEGER NOT NULL, custom_id TEXT NOT NULL, model TEXT NOT NULL,
    start INTEGER NOT NULL, size_bytes INTEGER NOT NULL, outcome INTEGER NOT NULL DEFAULT 0,
    result BLOB
);
CREATE UNIQUE INDEX lines_in_order ON lines (batch, outcome, line);
CREATE UNIQUE INDEX lines_by_number ON lines (batch, line);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    key_id TEXT, priority INTEGER NOT NULL, model TEXT NOT NULL, path TEXT NOT NULL,
    created_at REAL NOT NULL, deadline_at REAL NOT NULL, webhook TEXT, status TEXT NOT NULL,
    started_at REAL, ended_at REAL, expires_at REAL, code INTEGER, waits_for TEXT,
    body BLOB, answer BLOB
);
CREATE INDEX jobs_of_tenants ON jobs (tenant, seq) WHERE ended_at IS NULL;
CREATE TABLE hooks (
    id TEXT PRIMARY KEY, url TEXT NOT NULL, body BLOB NOT NULL, tenant TEXT NOT NULL DEFAULT ''
);
CREATE INDEX hooks_of_tenants ON hooks (tenant);
"""

# What makes a file of an older format one of the next.
_UPGRADES = {
    1: """
ALTER TABLE files ADD COLUMN key_id TEXT;
DROP INDEX jobs_unfinished;
CREATE INDEX jobs_of_tenants ON jobs (tenant, seq) WHERE ended_at IS NULL;
ALTER TABLE hooks ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
UPDATE hooks SET tenant = coalesce(
    (SELECT tenant FROM jobs WHERE id = json_extract(CAST(hooks.body AS TEXT), '$.data.id')),
    (SELECT tenant FROM batches WHERE id = json_extract(CAST(hooks.body AS TEXT), '$.data.id')),
    'anonymous'
);
CREATE INDEX hooks_of_tenants ON hooks (tenant);
""",
}

P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[Concatenate[sqlite3.Connection, P], T]


class StoreError(CallError):
    """The store cannot be used now; the log says why."""

    def __init__(self) -> None:
        message = "the router's store of jobs cannot be used now; its log says why"
        super().__init__(503, "store_unavailable", message, retry_after_s=5.0)


class StoreFull(CallError):
    """Nothing more is taken in until something was deleted or has expired."""

    def __init__(self, max_bytes: int) -> None:
        message = (
            f"the router's store has reached its {max_bytes} bytes (router.store_max_bytes);"
            " delete files that are not needed any more, or try again when others have expired"
        )
        super().__init__(507, "store_full", message)


class ShareFull(CallError):
    """Nothing more of this tenant's is taken in; the others' is."""

    def __init__(self, held_bytes: int, most_bytes: int) -> None:
        message = (
            f"this tenant's files, batches and jobs hold {held_bytes} bytes of the router's store,"
            f" and one may have {most_bytes} (router.store_tenant_share); delete files and jobs"
            " that are not needed any more, or try again when others have expired"
        )
        super().__init__(507, "store_share_full", message, final=True)


class JobStore:
    """The file `path`, made (0600) with the first call.

    `max_bytes`, and `tenant_share` of it for one tenant: see `check_room`.
    """

    def __init__(self, path: Path, max_bytes: int, tenant_share: float = 1.0) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._tenant_bytes = int(max_bytes * tenant_share)
        self._db: sqlite3.Connection | None = None
        self._seen = 0  # PRAGMA data_version: another connection's writes move it
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs")

    async def read(self, work: Work[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` finds in one consistent state. Raises StoreError."""
        return await self._run("BEGIN", lambda db: work(db, *args, **kwargs))

    async def write(self, work: Work[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work`, all of it or nothing; on the disk when this returns. Raises StoreError."""
        return await self._run("BEGIN IMMEDIATE", lambda db: work(db, *args, **kwargs))

    async def write_within(
        self, tenant: str, size_bytes: int, work: Work[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `write`, unless that would be more than the tenant may have: looked at in the same
        transaction, so that many at a time get no further than one. Raises ShareFull too: then
        nothing is written."""

        def checked(db: sqlite3.Connection) -> T:
            self._look(db, tenant, size_bytes)
            return work(db, *args, **kwargs)

        return await self._run("BEGIN IMMEDIATE", checked)

    async def changed(self) -> bool:
        """Whether another process has written since the last call. Raises StoreError."""
        now = await self._run(None, lambda db: _figure(db, "data_version"))
        before, self._seen = self._seen, now
        return now != before

    async def has_room(self) -> bool:
        """Whether less than `max_bytes` are used, whatever the file's own size."""
        return await self._run(None, used_bytes) < self._max_bytes

    async def check_room(self, tenant: str, size_bytes: int = 0) -> None:
        """Raises StoreFull, ShareFull (the tenant's) where `size_bytes` more is too much."""
        if await self._run(None, used_bytes) + size_bytes >= self._max_bytes:
            raise StoreFull(self._max_bytes)
        await self.check_share(tenant, size_bytes)

    async def check_share(self, tenant: str, size_bytes: int = 0) -> None:
        """Raises ShareFull where `size_bytes` more would be more than the tenant may have."""
        await self._run(None, lambda db: self._look(db, tenant, size_bytes))

    def _look(self, db: sqlite3.Connection, tenant: str, size_bytes: int) -> None:
        held = held_rows.of(db, tenant)
        if held + size_bytes >= self._tenant_bytes:
            raise ShareFull(held, self._tenant_bytes)

    async def overdrawn(self) -> frozenset[str]:
        """Tenants whose results have taken them so far beyond their share that more must wait."""
        most = int(self._tenant_bytes * RESULTS_FACTOR)
        return await self._run(None, lambda db: held_rows.beyond(db, most))

    async def shrink(self) -> None:
        """Give the disk back what is not used any more, a little at a time."""
        left, before = await self._run(None, _shrink), -1
        while left and left != before:
            left, before = await self._run(None, _shrink), left

    async def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(RuntimeError):  # closed before
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, begin: str | None, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            db = self._connection()
            if begin is None:
                return work(db)
            db.execute(begin)
            try:
                result = work(db)
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
            return result

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except (sqlite3.Error, OSError, RuntimeError) as error:
            log.error("the store %s: %s", self._path, error)
            raise StoreError from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = _open(self._path)
        return self._db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def used_bytes(db: sqlite3.Connection) -> int:
    """Bytes of the file that hold something."""
    pages = _figure(db, "page_count") - _figure(db, "freelist_count")
    return pages * _figure(db, "page_size")


def _shrink(db: sqlite3.Connection) -> int:
    """How many unused pages are left. `execute` would take one step of it, a page."""
    db.executescript(f"PRAGMA incremental_vacuum({_SHRUNK_PAGES})")
    return _figure(db, "freelist_count")


def _figure(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite's other files take its mode
    for attempt in Retrying(  # several workers may make the file at once
        retry=retry_if_exception_type(sqlite3.OperationalError),
        stop=stop_after_delay(BUSY_S),
        wait=wait_fixed(0.05),
        reraise=True,
    ):
        with attempt:
            return _prepared(path)
    raise AssertionError("not reached")


def _prepared(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts only before the first table
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        found = _figure(db, "user_version")
        if not 0 <= found <= FORMAT:
            raise OSError(
                f"its format is {found}, and this release reads {FORMAT}: a newer one wrote it. Run"
                " that one again, or stop this host's routers and move the file away, with its -wal"
                " and -shm; what is in it is then not served (docs/jobs.md)"
            )
        steps = [_SCHEMA] if found == 0 else [_UPGRADES[step] for step in range(found, FORMAT)]
        for statement in ";".join(steps).split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {FORMAT}")
        held_rows.prepare(db)
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db
