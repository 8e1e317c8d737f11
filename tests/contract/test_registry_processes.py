"""The embedded registry between real processes, also when one is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import Lock
from tests.kits.registry_waits import eventually

WORKER = "tests.kits.registry_worker"


@contextlib.contextmanager
def workers(count: int, mode: str, *args: object) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", WORKER, mode, *map(str, args)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finish(started: list[subprocess.Popen[str]]) -> list[str]:
    """Everything they printed, a line each, once all have ended well."""
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    return "".join(printed).split()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "made" / "by" / "whoever is first.db"


async def test_of_all_writers_one_wins_each_version(file: Path):
    """They also race to create the file."""
    with workers(4, "count", file, "key", 40) as started:
        won = finish(started)
    assert len(won) == len(set(won)) == 160
    registry = EmbeddedRegistry(file)
    entry = await registry.get("key")
    assert entry is not None
    assert entry.value == b"160"
    await registry.close()
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no drafts, no WAL left


async def test_the_lock_keeps_others_out(file: Path):
    file.parent.mkdir(parents=True)
    turns = Path(f"{file}.turns")
    turns.write_text("")
    with workers(4, "turns", file, "lock", 25) as started:
        finish(started)
    assert turns.read_text() == "100"


async def test_a_killed_holders_lock_is_free_after_its_ttl(file: Path):
    registry = EmbeddedRegistry(file)
    with workers(1, "hold", file, "lock", 2) as (holder,):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert await registry.acquire("lock", b"next", ttl_s=60) is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()

        async def next_in() -> Lock | None:
            return await registry.acquire("lock", b"next", ttl_s=60)

        lock = await eventually(next_in)
    assert lock is not None
    entry = await registry.get("lock")
    assert entry is not None
    assert entry.value == b"next"
    await registry.close()


async def test_writers_killed_at_work_leave_a_whole_file(file: Path):
    registry = EmbeddedRegistry(file)
    await registry.put("key", b"0")
    for _ in range(3):
        before = await registry.get("key")
        assert before is not None
        with workers(2, "count", file, "key", 10**9):

            async def moved(since: int = before.version) -> bool:
                entry = await registry.get("key")
                return entry is not None and entry.version > since + 20

            await eventually(moved, 60)
        # `workers` has killed both, most likely inside a write
    entry = await registry.get("key")
    assert entry is not None
    assert int(entry.value) == entry.version - 2  # the counter starts at 1; every win is there
    assert await registry.put("key", b"done", version=entry.version)
    await registry.close()
