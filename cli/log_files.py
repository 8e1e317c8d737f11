"""The logs of the parts that `stoker up` runs: bounded, however long it runs.

A part has its log open for appending, so a log that is full is copied and then emptied: what a part
writes between the two is lost, at most a line or two a rotation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

MAX_BYTES = 16 * 2**20
KEPT = 2  # older ones, `.log.1` and `.log.2`


def start_new(path: Path) -> Path:
    """Keep the last run's log beside the new one, which does not exist yet."""
    if path.exists():
        _make_way(path)
        path.replace(_older(path, 1))
    return path


def bound(path: Path, max_bytes: int = MAX_BYTES) -> bool:
    """Empty a log that is larger than `max_bytes`, its lines kept in the next older one.

    A full disk must not stop this: then nothing is kept.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
    except FileNotFoundError:
        return False
    _make_way(path)
    with contextlib.suppress(OSError):
        shutil.copyfile(path, _older(path, 1))
    os.truncate(path, 0)
    return True


def _make_way(path: Path) -> None:
    for number in range(KEPT, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            _older(path, number - 1).replace(_older(path, number))


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
