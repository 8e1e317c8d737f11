"""Ports in a row for a test's engines."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

HOST = "127.0.0.1"


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
    for first in range(21000, 31000, count):
        ports = range(first, first + count)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in ports:
                stack.enter_context(listening(port))
            return ports
    raise AssertionError("no such range is free")
