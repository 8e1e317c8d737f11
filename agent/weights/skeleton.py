"""What a model that is not here yet says of itself: its config and the headers of its weights.

Rules this file keeps:
- no weights are read: a file of weights becomes a sparse file of its size, its header in place, so
  that whatever sizes a model by its files (runtime/engine/vllm/memory_estimate.py) needs to know
  nothing of this;
- what a source claims is bounded before it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from agent.cache.errors import SourceError
from agent.cache.sources import Listing, Origin, RemoteFile
from runtime import places
from runtime.checkpoints import weight_headers

FETCH_S = 30.0  # whoever adds a model waits for its answer
_TEXTS = ("config.json", weight_headers.INDEX_FILE)
_MAX_TEXT_BYTES = 64 * 2**20
_FIRST_BYTES = 128 * 1024  # of a file of weights: mostly its whole header
_AT_ONCE = 8


@asynccontextmanager
async def fetched(origin: Origin) -> AsyncIterator[Path]:
    """A folder that looks like the model, until the block ends.

    Raises SourceError, or ValueError for files that are not what their names say.
    """
    with tempfile.TemporaryDirectory(prefix="stoker-skeleton-") as name:
        try:
            async with asyncio.timeout(FETCH_S):
                await asyncio.to_thread(write, origin, Path(name))
        except TimeoutError:
            words = f"{origin.name} has not said what the model consists of after {FETCH_S:g} s"
            raise SourceError("unreachable", words) from None
        finally:
            with contextlib.suppress(OSError):
                origin.close()
        yield Path(name)


def write(origin: Origin, folder: Path) -> None:
    """Write what `origin` lists into `folder`. Blocks; raises as `fetched` does."""
    listing = origin.listing()
    files = {places.below(folder, file.path): file for file in _wanted(listing)}
    for path, file in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.path in _TEXTS:
            path.write_bytes(_read(origin, file, 0, file.size_bytes))
        else:
            with path.open("wb") as made:
                os.truncate(made.fileno(), file.size_bytes)
    shards = [path for path in weight_headers.shards(folder) if path in files]
    with ThreadPoolExecutor(_AT_ONCE, "skeleton") as pool:
        list(pool.map(lambda path: _write_header(origin, files[path], path), shards))


def _wanted(listing: Listing) -> list[RemoteFile]:
    found = []
    for file in listing.files:
        if file.path in _TEXTS and file.size_bytes > _MAX_TEXT_BYTES:
            raise ValueError(f"{file.path} has {file.size_bytes} bytes: no such file is that large")
        if file.path in _TEXTS or file.path.endswith((".safetensors", ".bin")):
            found.append(file)
    return found


def _write_header(origin: Origin, file: RemoteFile, path: Path) -> None:
    head = _read(origin, file, 0, min(file.size_bytes, _FIRST_BYTES))
    if len(head) >= 8:
        (length,) = struct.unpack("<Q", head[:8])
        end = min(8 + length, file.size_bytes)
        if length <= weight_headers.MAX_HEADER_BYTES and end > len(head):
            head += _read(origin, file, len(head), end - len(head))
    with path.open("r+b") as made:
        made.write(head)


def _read(origin: Origin, file: RemoteFile, start: int, size_bytes: int) -> bytes:
    data = bytearray(size_bytes)
    if size_bytes:
        origin.read_into(file, start, memoryview(data))
    return bytes(data)
