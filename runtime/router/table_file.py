"""The last route table on disk, so that a restarted router serves with everything else down.

Rule this file keeps: the file holds engine keys, so only its owner may read it; it is replaced
whole or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime import wire


def save(path: Path, table: wire.RouteTable) -> None:
    """Replace `path` by `table`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(wire.encode(table))
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)


def load(path: Path) -> wire.RouteTable | None:
    """The table of `path`, or None where there is none. Raises OSError or ValueError."""
    try:
        return wire.decode(path.read_bytes(), wire.RouteTable)
    except FileNotFoundError:
        return None
