"""What an agent looks up for an inspection, and what it leaves alone for a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.server import _files_of
from runtime.wire import ModelSpec

SPEC = ModelSpec(name="m", source="hf:org/name")


class Cache:
    """A cache that has not got the model; its origin notes that it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.name = "the hub"

    async def where(self, source: str, *, anywhere: bool) -> Path | None:
        return None

    async def origin(self, source: str) -> Cache:
        return self

    def listing(self) -> None:
        self.asked += 1
        raise ValueError("nothing is here")

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("fetch", "asked"), [(False, 0), (True, 1)])
async def test_a_plan_asks_no_origin_of_a_model(fetch: bool, asked: int) -> None:
    cache = Cache()
    async with _files_of(cache, SPEC, fetch) as files:  # type: ignore[arg-type]
        assert (files.folder, files.missing) == (None, False)
        assert files.unknown is not None
        assert ("a plan asks nobody" in files.unknown) is not fetch
    assert cache.asked == asked
