"""What /proc shows of this process: its environment and its command line, overwritten in place.

A forked process shows what its parent was started with. The kernel reads both from the process's
own memory, so writing there is all it takes; no privilege is needed. The room is what the process
was started with: whoever starts a process that will fork others pads both (`PADDING_ENV`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

PADDING_ENV = "STOKER_PADDING"  # its value is room for the environments of forked processes


def replace_environment(environ: Mapping[str, str]) -> None:
    """Make `environ` this process's environment, in `os.environ` and in /proc/self/environ.

    Raises OSError, with nothing changed, if the room does not suffice. Only for a process with
    one thread.
    """
    start, end = _bounds(47)
    block = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())
    if len(block) > end - start:
        raise OSError(f"an environment of {len(block)} bytes does not fit into {end - start}")
    # First libc's copies, so that nothing points into the room any more.
    os.environ.clear()
    os.environ.update(environ)
    ctypes.memmove(start, block.ljust(end - start, b"\0"), end - start)


def set_title(argv: Sequence[str]) -> None:
    """Show `argv` as the command line, cut to the room there is."""
    start, end = _bounds(45)
    size = end - start
    if size < 2:
        return
    text = os.fsencode(" ".join(argv))[: size - 2]
    # A last byte that is not 0 tells the kernel that this is a title: it ends at the first 0.
    ctypes.memmove(start, text.ljust(size - 1, b"\0") + b"\1", size)


def _bounds(field: int) -> tuple[int, int]:
    """Two neighbouring addresses of /proc/self/stat; fields are counted from the state, as 0."""
    text = Path("/proc/self/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[field]), int(fields[field + 1])
