"""What an agent looks up for an inspection, and what it leaves alone for a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.cache.errors import CacheError
from agent.cache.resolve import look
from agent.engines.launch_plan import Place
from agent.server import ModelFiles, _files_of, inspect
from runtime.checkpoints.model_files import CacheConfig
from runtime.wire.model_spec import ModelSpec

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


@contextmanager
def not_root() -> Iterator[None]:
    """To root no folder is closed."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_model_in_a_folder_closed_to_the_agent_is_told_from_a_missing_one(tmp_path: Path) -> None:
    model = tmp_path / "closed" / "m"
    model.mkdir(parents=True)
    model.parent.chmod(0)
    with not_root(), pytest.raises(CacheError, match="may not look into") as caught:
        look(str(model), CacheConfig(), tmp_path)
    model.parent.chmod(0o700)
    assert caught.value.kind == "unauthorized"
    assert f"uid {os.geteuid() or 65534}" in str(caught.value)


def test_a_file_that_the_agent_may_not_read_leaves_the_spec_without_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "config.json"))

    monkeypatch.setattr("runtime.engine.vllm.memory_estimate.read_config", closed)
    engine = SimpleNamespace(check_args=lambda *_: ((), None))  # asking vLLM takes seconds
    monkeypatch.setattr("agent.server.get_engine", lambda _: engine)
    spec = ModelSpec(name="m", source=str(tmp_path), engine="vllm")
    place = Place(host="127.0.0.1", device_kind="cpu", python="python", cache_dir=str(tmp_path))
    found = inspect(spec, place, ModelFiles(tmp_path))
    assert "cannot be read" in (found.estimate_error or "")
    assert "config.json" in (found.estimate_error or "")
