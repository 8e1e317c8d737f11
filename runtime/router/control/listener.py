"""The router's listening socket: its own, or the one that systemd holds open for it.

With systemd's socket (`stoker-router.socket`) the port stays open while the router restarts:
callers wait in the backlog and none is refused. Several workers then accept on that one socket.
"""

from __future__ import annotations

import os
import socket

_FIRST_FD = 3  # systemd's: see sd_listen_fds(3)
_WORKER_FD = "STOKER_ROUTER_FD"  # the same, from the parent of the workers
BACKLOG = 4096


def given_fd() -> int | None:
    """The socket that this process was given, or None."""
    if os.environ.get(_WORKER_FD, "").isdigit():
        return int(os.environ[_WORKER_FD])
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return _FIRST_FD if ours and os.environ.get("LISTEN_FDS") == "1" else None


def worker_environ(fd: int) -> dict[str, str]:
    """What tells a child that it was given `fd`."""
    return {_WORKER_FD: str(fd)}


def listen(host: str, port: int, shared: bool) -> socket.socket:
    """The given socket, or a new one on `host` and `port`. Raises OSError if that is taken."""
    fd = given_fd()
    if fd is not None:
        given = socket.socket(fileno=fd)
        given.setblocking(False)
        return given
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
