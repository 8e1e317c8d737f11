"""Jobs in the store: calls of /invoke whose callers come back for the answer.

Rule this file keeps: a job ends once; an answer that comes after its end changes nothing.
"""

from __future__ import annotations

import sqlite3

from runtime.router.jobs.store import hook_rows, shapes
from runtime.router.jobs.store.rows import JobRow
from runtime.router.jobs.store.tenants import Owner, oldest_of_each

_COLUMNS = (
    "seq, id, tenant, key_id, priority, model, path, created_at, deadline_at, webhook, status,"
    " started_at, ended_at, expires_at, code, waits_for"
)


def insert(
    db: sqlite3.Connection, job_id: str, tenant: str, key_id: str | None, priority: int,
    model: str, path: str, body: bytes, webhook: str | None, now: float, window_s: float,
) -> JobRow:  # fmt: skip
    """A job that waits for its turn."""
    db.execute(
        "INSERT INTO jobs (id, tenant, key_id, priority, model, path, body, webhook, created_at,"
        " deadline_at, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'queued')",
        (job_id, tenant, key_id, priority, model, path, body, webhook, now, now + window_s),
    )
    row = get(db, Owner(tenant), job_id)
    assert row is not None
    return row


def get(db: sqlite3.Connection, owner: Owner, job_id: str) -> JobRow | None:
    """The owner's job of that id."""
    found = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
    row = JobRow(*found) if found else None
    return row if row is not None and owner.sees(row.tenant, row.key_id) else None


def with_answer(
    db: sqlite3.Connection, owner: Owner, job_id: str
) -> tuple[JobRow, bytes | None] | None:
    """The owner's job and the body of its answer."""
    row = get(db, owner, job_id)
    if row is None:
        return None
    answer = db.execute("SELECT answer FROM jobs WHERE seq = ?", (row.seq,)).fetchone()
    return row, answer[0]


def unfinished(db: sqlite3.Connection, limit: int) -> list[JobRow]:
    """Jobs without an answer: at most `limit` of each tenant, its oldest first."""
    return [JobRow(*row) for row in oldest_of_each(db, "jobs", _COLUMNS, limit)]


def waiting(db: sqlite3.Connection, tenant: str) -> int:
    """How many of the tenant's jobs have no answer yet, or a webhook that is not delivered."""
    jobs = "SELECT count(*) FROM jobs WHERE ended_at IS NULL AND tenant = ?"
    hooks = "SELECT count(*) FROM hooks WHERE tenant = ?"
    return sum(int(db.execute(query, (tenant,)).fetchone()[0]) for query in (jobs, hooks))


def start(db: sqlite3.Connection, job: int, now: float) -> bytes | None:
    """Mark a job as sent; its body, or None where it has ended."""
    query = "UPDATE jobs SET status = 'running', started_at = ? WHERE seq = ? AND ended_at IS NULL"
    if not db.execute(query, (now, job)).rowcount:
        return None
    body: bytes = db.execute("SELECT body FROM jobs WHERE seq = ?", (job,)).fetchone()[0]
    return body


def put_back(db: sqlite3.Connection, job: int, why: str) -> None:
    """Queue a job again that was refused and will be sent again."""
    db.execute(
        "UPDATE jobs SET status = 'queued', waits_for = ? WHERE seq = ? AND ended_at IS NULL",
        (why, job),
    )


def end(
    db: sqlite3.Connection, job: int, status: str, code: int | None, answer: bytes | None,
    now: float, keep_s: float,
) -> bool:  # fmt: skip
    """Mark a job as over; False where it was before."""
    done = db.execute(
        "UPDATE jobs SET status = ?, code = ?, answer = ?, body = NULL, ended_at = ?,"
        " expires_at = ? WHERE seq = ? AND ended_at IS NULL",
        (status, code, answer, now, now + keep_s, job),
    )
    if not done.rowcount:
        return False
    row = JobRow(*db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE seq = ?", (job,)).fetchone())
    if row.webhook is not None:
        event = shapes.event(f"job.{row.status}", row.id, shapes.job_object(row, None), now)
        hook_rows.insert(db, row.tenant, row.webhook, event)
    return True


def delete(db: sqlite3.Connection, job: int) -> None:
    """Forget a job that has ended."""
    db.execute("DELETE FROM jobs WHERE seq = ? AND ended_at IS NOT NULL", (job,))


def sweep(db: sqlite3.Connection, now: float) -> int:
    """Forget the answers whose time is over; how many these were."""
    return db.execute("DELETE FROM jobs WHERE expires_at < ?", (now,)).rowcount
