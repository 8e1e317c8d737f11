"""A process of its own at the embedded registry, for test_registry_processes.py.

python -m tests.kits.registry_worker:
    count FILE KEY TIMES    add 1 to KEY, TIMES times; prints the versions it won
    turns FILE KEY TIMES    take the lock KEY, add 1 to the plain file FILE.turns
    hold FILE KEY TTL_S     take the lock, print "held", renew it until killed
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from runtime.registry.embedded import EmbeddedRegistry


async def count(registry: EmbeddedRegistry, key: str, times: int) -> None:
    while times:
        entry = await registry.get(key)
        value = int(entry.value) if entry else 0
        version = entry.version if entry else 0
        if await registry.put(key, str(value + 1).encode(), version=version):
            print(version)
            times -= 1


async def turns(registry: EmbeddedRegistry, key: str, times: int, shared: Path) -> None:
    while times:
        lock = await registry.acquire(key, b"turn", ttl_s=60)
        if lock is None:
            await asyncio.sleep(0.002)
            continue
        value = int(shared.read_text() or 0)
        await asyncio.sleep(0)
        shared.write_text(str(value + 1))
        await lock.release()
        times -= 1


async def hold(registry: EmbeddedRegistry, key: str, ttl_s: float) -> None:
    lock = await registry.acquire(key, b"holder", ttl_s)
    assert lock is not None
    print("held", flush=True)
    while await lock.renew():
        await asyncio.sleep(ttl_s / 3)


async def main(mode: str, file: str, key: str, number: str) -> None:
    registry = EmbeddedRegistry(file)
    if mode == "count":
        await count(registry, key, int(number))
    elif mode == "turns":
        await turns(registry, key, int(number), Path(f"{file}.turns"))
    else:
        await hold(registry, key, float(number))
    await registry.close()


asyncio.run(main(*sys.argv[1:]))
