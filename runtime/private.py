"""What Stoker keeps on a host is for its own user: keys, callers' data, sockets, logs.

Rule this file keeps: it is called once, before a process makes its first file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

from runtime.places import below

log = logging.getLogger("stoker.private")

_SECRETS = ("logs", "replicas", "adapters")  # folders of a state dir; what is large is not walked
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def keep_private(state_dir: str | Path) -> int:
    """See to it that nobody else may read what this process makes, and what is in `state_dir`.

    Returns the umask of before. The state dir stays open to its group, if somebody chose that.
    Raises OSError where it can't be made; the umask is as before then.
    """
    before = os.umask(0o077)
    try:
        _close_all(Path(state_dir))
    except OSError:
        os.umask(before)
        raise
    return before


def _close_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _close(folder, stat.S_IRWXO)
    inner = [path for name in _SECRETS for path in below(folder, name).glob("*")]
    for path in [*folder.iterdir(), *inner]:
        if path.is_file() or path.is_socket() or path.name in _SECRETS:
            _close(path, _OTHERS)


def _close(path: Path, bits: int) -> None:
    """What an earlier version left open; what is another user's is only said."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or not found.st_mode & bits:
            return
        try:
            path.chmod(stat.S_IMODE(found.st_mode) & ~bits)
        except PermissionError:
            log.warning("%s can be read by others, and is not ours to close: chmod go-rwx", path)
