"""The store of jobs: whole or not at all, once and not twice, and what a kill -9 leaves."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.router.jobs.store import batch_rows, file_rows, held_rows, hook_rows, job_rows
from runtime.router.jobs.store.database import (
    JobStore,
    ShareFull,
    StoreError,
    StoreFull,
    used_bytes,
)
from runtime.router.jobs.store.file_rows import CHUNK_BYTES, ERROR, OK
from runtime.router.jobs.store.rows import BatchRow, FileRow, LineRow
from runtime.router.jobs.store.tenants import Owner
from tests.kits.checkout import ROOT

NOW = 1000.0
FIRST_FORMAT = Path(__file__).parent / "jobs_format_1.sql"


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[JobStore]:
    made = JobStore(tmp_path / "state" / "jobs.db", 2**30)
    yield made
    await made.close()


async def upload(db: JobStore, data: bytes, name: str = "file-1", tenant: str = "t") -> FileRow:
    file = await db.write(file_rows.begin, name, Owner(tenant), NOW)
    await db.write(file_rows.add_chunks, file, 0, data)
    return await db.write(file_rows.end, file, "in.jsonl", "batch", len(data), NOW + 100)


async def batch_of(
    db: JobStore, count: int, name: str = "batch_1", tenant: str = "t", webhook: str | None = None
) -> BatchRow:
    """A batch in progress with so many lines."""
    file = await upload(db, b"x" * count, f"file-of-{name}", tenant)
    row = await db.write(
        batch_rows.insert, name, tenant, None, "/v1/embeddings", file, {"a": "b"}, NOW, 50.0, 30.0,
        webhook,
    )  # fmt: skip
    assert row is not None
    lines = [LineRow(n, f"c{n}", "m", n - 1, 1) for n in range(1, count + 1)]
    await db.write(batch_rows.add_lines, row.seq, lines)
    await db.write(batch_rows.validated, row.seq, count, NOW)
    return await db.read(batch_rows.by_seq, row.seq)


async def content(db: JobStore, file: FileRow) -> bytes:
    data, position = await db.read(file_rows.content, file, 0)
    whole = data
    while data and position is not None:
        data, position = await db.read(file_rows.content, file, position)
        whole += data
    return whole


async def test_the_file_is_its_owners_and_several_may_make_it_at_once(tmp_path: Path) -> None:
    stores = [JobStore(tmp_path / "jobs.db", 2**30) for _ in range(6)]
    assert await asyncio.gather(*(s.has_room() for s in stores)) == [True] * 6
    assert stat.S_IMODE((tmp_path / "jobs.db").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "jobs.db-wal").stat().st_mode) == 0o600
    for made in stores:
        await made.close()


async def test_a_write_that_fails_leaves_nothing(db: JobStore) -> None:
    def half(connection: sqlite3.Connection) -> None:
        file_rows.begin(connection, "file-1", Owner("t"), NOW)
        file_rows.begin(connection, "file-1", Owner("t"), NOW)  # the id is taken

    with pytest.raises(StoreError):
        await db.write(half)
    assert (await upload(db, b"abc")).seq == 1


async def test_a_file_of_another_version_is_refused_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "jobs.db"
    with sqlite3.connect(path) as made:
        made.execute("PRAGMA user_version = 99")
    made.close()
    with pytest.raises(StoreError) as caught:
        await JobStore(path, 2**30).has_room()
    assert caught.value.status == 503
    assert str(tmp_path) not in caught.value.message
    assert "its format is 99, and this release reads 2: a newer one wrote it" in caplog.text
    assert "-wal and -shm" in caplog.text
    with sqlite3.connect(path) as left:
        assert left.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    left.close()


async def test_uploads_come_back_whole_and_in_part(db: JobStore) -> None:
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256 + 1)
    file = await upload(db, data)
    assert await content(db, file) == data
    for start, size in ((0, 1), (CHUNK_BYTES - 1, 2), (5, 2 * CHUNK_BYTES), (len(data) - 3, 99)):
        assert await db.read(file_rows.part, file.seq, start, size) == data[start : start + size]
    assert await db.read(file_rows.part, file.seq, len(data), 9) == b""


async def test_what_is_another_tenants_or_not_whole_is_not_there(db: JobStore) -> None:
    await upload(db, b"x", "file-1", "a")
    await db.write(file_rows.begin, "file-2", Owner("a"), NOW)
    assert await db.read(file_rows.get, Owner("a"), "file-1")
    assert await db.read(file_rows.get, Owner("b"), "file-1") is None
    assert await db.read(file_rows.get, Owner("a"), "file-2") is None
    listed = await db.read(file_rows.page, Owner("a"), None, None, 10, False)
    assert [file.id for file in listed] == ["file-1"]


async def test_a_result_counts_once(db: JobStore) -> None:
    row = await batch_of(db, 2)
    assert await db.write(batch_rows.finish_line, row.seq, 1, OK, b"first")
    assert not await db.write(batch_rows.finish_line, row.seq, 1, ERROR, b"second")
    now = await db.read(batch_rows.by_seq, row.seq)
    assert (now.total, now.completed, now.failed) == (2, 1, 0)
    assert [line.line for line in await db.read(batch_rows.pending, row.seq, 0, 9)] == [2]


@pytest.mark.parametrize("status", ["completed", "cancelled", "expired"])
async def test_the_end_gives_every_line_one_result_in_order(db: JobStore, status: str) -> None:
    row = await batch_of(db, 900, webhook="https://x.example/")
    done = range(900, 0, -1) if status == "completed" else range(500, 0, -1)
    for line in done:
        outcome = ERROR if line % 7 == 0 else OK
        result = json.dumps({"custom_id": f"c{line}", "pad": "x" * 200}).encode()
        await db.write(batch_rows.finish_line, row.seq, line, outcome, result)
    if status == "cancelled":
        assert (await db.write(batch_rows.cancel, Owner("t"), row.id, NOW)).status == "cancelling"
    left = await db.write(
        batch_rows.end, row.seq, status, NOW + 1, "file-out", "file-err", "why not"
    )
    assert left == 900 - len(done)
    ended = await db.read(batch_rows.by_seq, row.seq)
    assert (ended.status, ended.completed + ended.failed) == (status, 900)
    seen = []
    for file_id in (ended.output_id, ended.error_id):
        file = await db.read(file_rows.get, Owner("t"), file_id)
        whole = await content(db, file)
        assert len(whole) == file.size_bytes
        numbers = [int(json.loads(line)["custom_id"][1:]) for line in whole.splitlines()]
        assert numbers == sorted(numbers)
        seen += numbers
    assert sorted(seen) == list(range(1, 901))
    last = json.loads(whole.splitlines()[-1])
    if left:
        assert last["response"] is None
        assert last["error"] == {"code": f"batch_{status}", "message": "why not"}
    (hook,) = await db.read(hook_rows.due, 10)
    assert json.loads(hook.body)["type"] == f"batch.{status}"


async def test_a_bad_file_ends_its_batch_without_lines(db: JobStore) -> None:
    row = await batch_of(db, 3)
    await db.write(batch_rows.refuse, row.seq, [{"line": 1}], NOW)  # too late: it is in progress
    assert (await db.read(batch_rows.by_seq, row.seq)).status == "in_progress"


async def test_each_tenants_oldest_batches_are_worked_on_and_all_that_end(db: JobStore) -> None:
    for tenant in "ab":
        for number in range(6):
            await batch_of(db, 1, f"batch_{tenant}{number}", tenant)
    await db.write(batch_rows.cancel, Owner("a"), "batch_a5", NOW)
    found = [row.id for row in await db.read(batch_rows.unfinished, NOW)]
    first = [f"batch_{tenant}{number}" for tenant in "ab" for number in range(4)]
    assert sorted(found) == sorted([*first, "batch_a5"])
    assert len(await db.read(batch_rows.unfinished, NOW + 51)) == 12


async def test_a_file_that_is_read_stays_and_what_has_expired_goes(db: JobStore) -> None:
    row = await batch_of(db, 1)
    file = await db.read(file_rows.get, Owner("t"), row.input_id)
    assert await db.write(file_rows.delete_unused, file) == row.id
    assert await db.read(file_rows.expired, NOW + 999, 3600.0) == []
    await db.write(batch_rows.finish_line, row.seq, 1, OK, b"{}")
    await db.write(batch_rows.end, row.seq, "completed", NOW, "file-out", "file-err", "")
    output = await db.read(file_rows.get, Owner("t"), "file-out")
    assert sorted(await db.read(file_rows.expired, NOW + 999, 3600.0)) == [file.seq, output.seq]
    assert await db.read(batch_rows.expired, NOW + 29) == []
    assert await db.read(batch_rows.expired, NOW + 31) == [row.seq]
    await db.write(batch_rows.delete, row.seq)
    assert await db.write(file_rows.delete_unused, file) is None
    assert await db.read(batch_rows.page, Owner("t"), None, 9) == []
    assert await content(db, output) == b""


async def test_uploads_given_up_on_go(db: JobStore) -> None:
    file = await db.write(file_rows.begin, "file-1", Owner("t"), NOW)
    assert await db.read(file_rows.expired, NOW + 3599, 3600.0) == []
    assert await db.read(file_rows.expired, NOW + 3601, 3600.0) == [file]


async def test_a_job_ends_once(db: JobStore) -> None:
    row = await db.write(
        job_rows.insert, "job_1", "t", None, 0, "m", "/v1/completions", b"{}",
        "https://x.example/", NOW, 60.0,
    )  # fmt: skip
    assert await db.write(job_rows.start, row.seq, NOW) == b"{}"
    assert await db.write(job_rows.end, row.seq, "cancelled", None, None, NOW, 10.0)
    assert not await db.write(job_rows.end, row.seq, "completed", 200, b"late", NOW, 10.0)
    assert await db.write(job_rows.start, row.seq, NOW) is None
    found, answer = await db.read(job_rows.with_answer, Owner("t"), "job_1")
    assert (found.status, answer) == ("cancelled", None)
    assert await db.read(job_rows.with_answer, Owner("u"), "job_1") is None
    assert len(await db.read(hook_rows.due, 10)) == 1
    assert await db.write(job_rows.sweep, NOW + 11) == 1


async def test_the_limit_counts_what_is_used_and_gives_back_what_was_deleted(
    tmp_path: Path,
) -> None:
    db = JobStore(tmp_path / "jobs.db", 2**20)
    await db.check_room("t", 2**19)
    file = await upload(db, b"x" * 2**20)
    assert not await db.has_room()
    with pytest.raises(StoreFull, match=r"router\.store_max_bytes") as caught:
        await db.check_room("other")
    assert caught.value.status == 507
    await db.write(file_rows.delete, file.seq)
    assert await db.has_room()
    await db.shrink()
    await db.close()
    assert (tmp_path / "jobs.db").stat().st_size < 2**19


async def test_only_others_writes_are_news(tmp_path: Path) -> None:
    ours, theirs = JobStore(tmp_path / "jobs.db", 2**30), JobStore(tmp_path / "jobs.db", 2**30)
    await ours.changed()
    await upload(ours, b"x", "file-1")
    assert not await ours.changed()
    await upload(theirs, b"x", "file-2")
    assert await ours.changed()
    assert not await ours.changed()
    await ours.close()
    await theirs.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from runtime.router.jobs.store import batch_rows
from runtime.router.jobs.store.database import JobStore

async def main():
    db = JobStore(Path(sys.argv[1]), 2**30)
    for line in range(1, 100000):
        await db.write(batch_rows.finish_line, 1, line, 1, b"%d " % line * 2000)
        print(line, flush=True)

asyncio.run(main())
"""


async def test_what_was_said_to_be_kept_is_kept_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    db = JobStore(path, 2**30)
    row = await batch_of(db, 5000)
    await db.close()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(60)]
    process.kill()
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = dict(raw.execute("SELECT line, result FROM lines WHERE outcome = 1"))
    raw.close()
    assert set(told) <= set(kept)
    assert len(kept) <= len(told) + 1  # the one that was on its way
    assert all(result == b"%d " % line * 2000 for line, result in kept.items())
    db = JobStore(path, 2**30)
    now = await db.read(batch_rows.by_seq, row.seq)
    assert now.completed == len(kept)
    (next_line, *_) = await db.read(batch_rows.pending, row.seq, 0, 1)
    assert next_line.line == max(kept) + 1
    await db.close()


async def job_of(db: JobStore, tenant: str, name: str) -> int:
    row = await db.write(
        job_rows.insert, name, tenant, None, 0, "m", "/v1/completions", b"{}",
        "https://x.example/", NOW, 60.0,
    )  # fmt: skip
    return row.seq


async def test_each_tenant_has_a_window_of_its_own_in_every_queue(db: JobStore) -> None:
    for number in range(12):
        await job_of(db, "greedy", f"job_g{number}")
    last = await job_of(db, "modest", "job_m")
    found = await db.read(job_rows.unfinished, 3)
    assert [row.id for row in found] == ["job_g0", "job_g1", "job_g2", "job_m"]
    assert await db.read(job_rows.waiting, "greedy") == 12
    for job in (*range(1, 13), last):
        await db.write(job_rows.end, job, "cancelled", None, None, NOW, 10.0)
    hooks = await db.read(hook_rows.due, 3)
    assert [hook.tenant for hook in hooks] == ["greedy"] * 3 + ["modest"]
    assert await db.read(job_rows.waiting, "greedy") == 12  # what is still to be delivered counts


async def test_a_file_of_the_first_format_is_taken_over_whole(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    old = FIRST_FORMAT.read_text()
    with sqlite3.connect(path) as made:
        made.executescript(old)
    made.close()
    db = JobStore(path, 2**30)
    assert [row.id for row in await db.read(job_rows.unfinished, 9)] == ["job_1"]
    assert [hook.tenant for hook in await db.read(hook_rows.due, 9)] == ["b"]
    assert (await db.read(file_rows.get, Owner("a"), "file-1")).key_id is None
    assert set(await db.read(held)) == {"a", "b"}
    await db.close()
    again = JobStore(path, 2**30)
    assert len(await again.read(hook_rows.due, 9)) == 1
    await again.close()


async def test_one_tenant_fills_its_share_and_not_the_store(tmp_path: Path) -> None:
    db = JobStore(tmp_path / "jobs.db", 2**20, 0.5)
    file = await upload(db, b"x" * (2**19 - 1000), "file-1", "greedy")
    with pytest.raises(ShareFull, match=r"524288 \(router\.store_tenant_share\)") as caught:
        await db.check_room("greedy", 1000)
    assert (caught.value.status, caught.value.final) == (507, True)
    await db.check_room("modest", 2**18)
    assert await db.overdrawn() == frozenset()  # what was taken in is worked on
    await upload(db, b"x" * 2**18, "file-2", "greedy")
    assert await db.overdrawn() == {"greedy"}
    await db.write(file_rows.delete, file.seq)
    await db.check_room("greedy", 1000)
    assert await db.overdrawn() == frozenset()
    await db.close()


async def test_many_who_look_for_room_at_once_get_no_further_than_one(tmp_path: Path) -> None:
    db = JobStore(tmp_path / "jobs.db", 2**20, 0.5)
    body = b"x" * 2**17

    async def one(number: int) -> bool:
        await db.check_room("greedy", len(body))  # there is room for each of them alone
        try:
            await db.write_within(
                "greedy", len(body), job_rows.insert, f"job_{number}", "greedy", None, 0, "m",
                "/v1/completions", body, None, NOW, 60.0,
            )  # fmt: skip
        except ShareFull:
            return False
        return True

    kept = await asyncio.gather(*(one(number) for number in range(8)))
    assert sum(kept) == 3
    assert await db.read(job_rows.waiting, "greedy") == 3
    assert await db.overdrawn() == frozenset()
    await db.close()


def held(db: sqlite3.Connection) -> dict[str, int]:
    return {tenant: size for tenant, size in db.execute("SELECT * FROM held") if size}


def counted_again(db: sqlite3.Connection) -> dict[str, int]:
    """What the rows that are there hold, whatever was counted on the way."""
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    db.execute("DROP TABLE held")
    held_rows.prepare(db)
    return held(db)


async def test_what_a_tenant_holds_is_counted_through_all_that_a_row_goes_through(
    db: JobStore,
) -> None:
    webhook = "https://x.example/"
    row = await batch_of(db, 500, tenant="a", webhook=webhook)
    await batch_of(db, 20, "batch_2", "b")
    for line in range(1, 300):
        await db.write(batch_rows.finish_line, row.seq, line, OK, b"x" * line)
    job = await job_of(db, "a", "job_1")
    await db.write(job_rows.end, job, "completed", 200, b"y" * 5000, NOW, 10.0)
    await job_of(db, "b", "job_2")
    await db.write(batch_rows.end, row.seq, "cancelled", NOW, "file-out", "file-err", "why")
    bad = await batch_of(db, 3, "batch_3", "b")
    await db.write(batch_rows.begin_lines, bad.seq)
    before = await db.read(held)
    assert before["a"] > 500 + 299 * 150 + 5000
    assert before == await db.write(counted_again)
    await db.write(batch_rows.delete, row.seq)
    await db.write(file_rows.delete, row.input)
    await db.write(job_rows.sweep, NOW + 11)
    for hook in await db.read(hook_rows.due, 10):
        await db.write(hook_rows.delete, hook.id)
    after = await db.read(held)
    assert "a" not in after
    assert after["b"] == before["b"]


@pytest.mark.parametrize("character", ["\U0001f600", "\0"])
async def test_texts_are_counted_in_bytes_whatever_is_in_them(db: JobStore, character: str) -> None:
    row = await batch_of(db, 1)
    before = await db.read(held_rows.of, "t")
    name = character * 512
    await db.write(batch_rows.add_lines, row.seq, [LineRow(2, name, "m", 0, 1)])
    assert await db.read(held_rows.of, "t") - before >= len(name.encode())
    await db.write(batch_rows.begin_lines, row.seq)
    assert await db.write(counted_again) == {"t": await db.read(held_rows.of, "t")}


async def test_many_small_rows_are_counted_as_what_they_take(db: JobStore) -> None:
    for number in range(2000):
        await job_of(db, "t", f"job_{number:024}")
    used = await db.read(used_bytes)
    assert used / 2 < await db.read(held_rows.of, "t") < 2 * used
