"""What the cache's tests share: nodes, a shared store, and a gate that its readers wait at."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agent.cache import fetch
from agent.cache.sources import FolderSource
from tests.kits.cache_nodes import Nodes


@pytest.fixture
async def nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RANGE_BYTES", 2**20)
    async with Nodes(tmp_path) as nodes:
        yield nodes


@pytest.fixture
def shared(tmp_path) -> Path:
    folder = tmp_path / "nfs"
    folder.mkdir()
    return folder


class Gate:
    """Lets folders be read once `open`; `then` runs in the reading thread before."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.after_bytes = 0
        self.then = lambda: None


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    read = FolderSource.read_into

    def read_into(self, file, start, view):
        if start >= gate.after_bytes:
            gate.reached.set()
            assert gate.open.wait(20)
            gate.then()
        read(self, file, start, view)

    monkeypatch.setattr(FolderSource, "read_into", read_into)
    yield gate
    gate.open.set()
