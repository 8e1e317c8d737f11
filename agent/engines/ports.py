"""The ports of this node's engines: one for each replica, from a range where the operator set one.

Rules this file keeps:
- two starts at once never get the same port, and no start that of an adopted engine;
- what `agent.engine_ports` leaves out is never given, also where nothing else is free.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable

_NOT_OURS = {errno.EADDRINUSE, errno.EACCES}


class NoFreePort(Exception):
    """The whole range is in use; the message says what to do."""


class Ports:
    """Which replica has which port. All methods are for the event loop's thread."""

    def __init__(self, allowed: range | None = None, never: Iterable[int] = ()) -> None:
        """`allowed`: agent.engine_ports, None: any; `never`: what Stoker's own parts listen on."""
        self._allowed = allowed
        self._never = frozenset(never)
        self._held: dict[str, int] = {}
        self._given = 0  # so many were; the next one begins to look there

    def take(self, replica_id: str, host: str) -> int:
        """A port for a new engine to listen on at `host`; the one it had before goes back.

        Raises NoFreePort, or OSError if `host` is none of this machine's.
        """
        self.give_back(replica_id)
        taken = self._never.union(self._held.values())
        if self._allowed is None:
            port = free_port(host, taken)
        else:
            port = self._free_of(self._allowed, host, taken)
        self._held[replica_id] = port
        return port

    def keep(self, replica_id: str, port: int) -> None:
        """An adopted engine listens there already."""
        self._held[replica_id] = port

    def give_back(self, replica_id: str) -> None:
        """Free the port of an engine that is gone; one without a port is success."""
        self._held.pop(replica_id, None)

    def _free_of(self, allowed: range, host: str, taken: Collection[int]) -> int:
        """The next after the last one given: a port rests before it is another engine's.

        One that somebody holds without listening is taken only where all others are in use: it may
        be another agent's engine that loads its model, or what is left of an ended one's
        connections, and only the first makes two engines share a port.
        """
        for reuse in (False, True):
            for _ in allowed:
                port = allowed[self._given % len(allowed)]
                self._given += 1
                if port not in taken and _is_free(host, port, reuse):
                    return port
        held = sum(port in allowed for port in self._held.values())
        raise NoFreePort(
            f"no port of agent.engine_ports = '{allowed[0]}-{allowed[-1]}' is free: engines of this"
            f" node hold {held} of {len(allowed)}; set a wider range in this node's stoker.toml and"
            " reload the agent"
        )


def free_port(host: str, taken: Collection[int]) -> int:
    """A TCP port nobody listens on at `host`, none of `taken`. Raises OSError if `host` is bad."""
    while True:
        with _socket_for(host) as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


def _is_free(host: str, port: int, reuse: bool) -> bool:
    """`reuse`, as engines do: whether nobody listens there. Connections of an engine that ended
    keep its port for a minute otherwise."""
    with _socket_for(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in _NOT_OURS:
                return False
            raise
    return True


def _socket_for(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
