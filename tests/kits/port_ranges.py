"""Ports in a row for a test's engines.

Test processes that run side by side (pytest-xdist's workers, or two checkouts on one host) each
have a block of ports of their own: two that look for free ports at the same time find the same.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator

HOST = "127.0.0.1"
# Below the ports that Linux gives to outgoing connections (from 32768).
BLOCKS = range(21000, 31000, 500)


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    """Another program on that port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
        yield


def free_range(count: int) -> range:
    """So many ports in a row that nobody uses now; no connection out of here takes one of them."""
    block, _ = _own_block()
    for first in range(block.start, block.stop - count + 1, count):
        ports = range(first, first + count)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in ports:
                stack.enter_context(listening(port))
            return ports
    raise AssertionError(f"no {count} ports in a row are free in {block.start}-{block.stop - 1}")


@functools.cache
def _own_block() -> tuple[range, socket.socket]:
    """A block of ports for this process, and what holds it: the kernel lets it go at its end."""
    for first in BLOCKS:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0stoker-tests-ports-{first}")
        except OSError:
            claim.close()
            continue
        return range(first, first + BLOCKS.step), claim
    raise AssertionError("every block of ports belongs to another test process")
