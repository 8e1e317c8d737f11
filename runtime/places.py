"""One way from a word that somebody else chose to a file, to a URL, or to a key of the registry.

A word is a segment of a request's path, an id, a revision, a source or the name of a file: it may
come from a caller, an operator, another node, a hub or a disk that others write to.

Rules this file keeps:
- a path of several words stays below its root: no `..`, no absolute name, and no symbolic link that
  leads out of it;
- a segment of a URL is quoted whole, so it is never a second segment, a query or a step up; a
  client would resolve `.` and `..` even where they are quoted, so these are refused;
- a word that can't be used is an `Outside`, whose message names it. Nobody repairs it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, urlencode

MAX_NAME_BYTES = 255  # what file systems allow for one name
_HEX = re.compile(r"0[xX][0-9a-fA-F]*")
_STEPS = ("", ".", "..")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Outside(ValueError):
    """A word that may not name a file or an address; the message says which and why."""


def below(root: str | Path, *words: str) -> Path:
    """`root/word/…` by its text alone: asks no disk, so a link may still lead out of `root`.

    A word may hold `/`, as in the path of a model's file. Raises Outside.
    """
    return Path(root).joinpath(*(part for word in words for part in _parts(word)))


def inside(root: str | Path, *words: str) -> Path:
    """As `below`, and no symbolic link on the way leads out of `root`; it need not be there.

    Blocks: it looks at the disk. Raises Outside, OSError.
    """
    path = below(root, *words)
    _check_inside(Path(root), path, path.resolve())
    return path


def open_inside(root: str | Path, *words: str) -> int:
    """Open that file for reading; what was opened is what is checked, so a link that is changed
    meanwhile gains nothing.

    Raises Outside, OSError.
    """
    path = below(root, *words)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would block
    try:
        _check_inside(Path(root), path, Path(os.readlink(f"/proc/self/fd/{file}")))
    except BaseException:
        os.close(file)
        raise
    return file


def url(base: str, *segments: str, **query: str | int | float) -> str:
    """`base/segment/…?name=value`, each segment and value quoted. Raises Outside."""
    path = "".join(f"/{quote(_segment(segment), safe='')}" for segment in segments)
    return f"{base.rstrip('/')}{path}{'?' if query else ''}{urlencode(query)}"


def base_url(host: str, port: int) -> str:
    """`http://host:port`, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_numeric(host: str) -> bool:
    """Whether a host is meant as an address, in whichever form, or is none at all.

    Many libraries read `2130706433`, `0x7f.1` or `127.1` as 127.0.0.1, without asking a resolver: a
    name whose last label is a number is such an address, or none (as URLs have it in browsers).
    """
    last = host.removesuffix(".").rpartition(".")[2]
    return ":" in host or last.isdigit() or _HEX.fullmatch(last) is not None


def key(prefix: str, *segments: str) -> str:
    """`prefix/segment/…`: a key of the registry, one level a segment. Raises Outside."""
    for segment in segments:
        if "/" in _segment(segment):
            raise Outside(f"{segment!r} is not a part of a key: it holds a '/'")
    return "/".join((prefix, *segments))


def checked(pattern: re.Pattern[str], word: str, what: str) -> str:
    """`word` if the whole of it is what `pattern` says. Raises Outside: "`what` must …"."""
    if not pattern.fullmatch(word):
        raise Outside(f"{what} {word[:200]!r} does not match {pattern.pattern}")
    return word


def _segment(word: str) -> str:
    if word in _STEPS or _CONTROL.search(word):
        raise Outside(f"{word[:200]!r} is not a part of an address")
    return word


def _parts(word: str) -> list[str]:
    parts = word.split("/")
    for part in parts:
        if part in _STEPS or "\\" in part or _CONTROL.search(part):
            raise Outside(f"{word[:200]!r} is not a path inside of a folder")
        if len(part.encode()) > MAX_NAME_BYTES:
            raise Outside(f"{word[:80]!r}… has a name of more than {MAX_NAME_BYTES} bytes")
    return parts


def _check_inside(root: Path, path: Path, real: Path) -> None:
    if not real.is_relative_to(root.resolve()):
        raise Outside(f"{path} is a link that leads out of {root}")
