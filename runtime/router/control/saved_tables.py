"""The last tables on disk, so that a restarted router serves with everything else down.

Rule this file keeps: the files hold engine keys and digests of callers' keys, so only their owner
may read them; each is replaced whole or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from runtime import outside

Table = TypeVar("Table", bound=msgspec.Struct)


def save(path: Path, table: msgspec.Struct) -> None:
    """Replace `path` by `table`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(msgspec.json.encode(table))
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)


def load(path: Path, kind: type[Table]) -> Table | None:
    """The table of `path`, or None where there is none. Raises OSError or ValueError."""
    try:
        return outside.decode(path.read_bytes(), kind)
    except FileNotFoundError:
        return None
