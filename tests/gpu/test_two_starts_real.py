"""Two real vLLM that start at once on one NVIDIA GPU, each told the bytes of its KV cache: neither
measures what is free, so neither sees the other's memory move. Skips where there is no GPU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.devices.nvml import NvmlSource
from tests.kits.gpu_engine import BOOKED, GIB, a_gpu, family, ready, started

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(1300)]


@pytest.fixture(scope="module")
def source() -> Iterator[NvmlSource]:
    with a_gpu() as opened:
        yield opened


def test_both_hold_what_one_holds_that_started_alone(source: NvmlSource, tmp_path: Path) -> None:
    """Seconds are printed: twice the one's, together, would be no gain."""

    def held(pids: dict[str, list[int]]) -> dict[str, int]:
        source.read(pids)
        return {name: used for name, used in source.replica_bytes().items() if used is not None}

    with started(source, tmp_path, "alone", kv_bytes=GIB) as (process, url, log):
        began = time.monotonic()
        asyncio.run(ready(process, url, log))
        print(f"alone: {time.monotonic() - began:.1f} s")
        alone = held({"alone": family(process)})["alone"]
    with (
        started(source, tmp_path, "a", kv_bytes=GIB) as a,
        started(source, tmp_path, "b", kv_bytes=GIB) as b,
    ):
        began = time.monotonic()

        async def both() -> None:
            await asyncio.gather(ready(*a), ready(*b))

        asyncio.run(both())
        print(f"two at once: {time.monotonic() - began:.1f} s")
        together = held({"a": family(a[0]), "b": family(b[0])})
    for name in ("a", "b"):
        assert abs(together[name] - alone) <= alone // 10, (name, together, alone)
        assert together[name] <= BOOKED
