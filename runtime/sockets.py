"""How a connection to another host notices that the host is gone without a word.

Rule this file keeps: every connector of aiohttp that may lead to another host is made here.

A host that lost its power or its link sends neither FIN nor RST. Probes tell where nothing is under
way to it, TCP_USER_TIMEOUT where bytes are that it never acknowledges: the kernel would send those
again for a quarter of an hour, and probe nothing meanwhile.
"""

from __future__ import annotations

import socket
from typing import Any

import aiohttp

SILENT_S = 2.0  # without a byte: below the time after which a node is called lost
GONE_S = 10  # as long as the scheduler waits for a heartbeat (scheduler.node_timeout_s)
_PROBES = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))  # GONE_S in all


def notice_silence(sock: socket.socket) -> None:
    """End a TCP connection whose other end has been silent for GONE_S; others are left alone."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (*_PROBES, ("TCP_USER_TIMEOUT", GONE_S * 1000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def tcp_connector(**options: Any) -> aiohttp.TCPConnector:
    """For a client session of aiohttp: its connections notice silence."""
    return aiohttp.TCPConnector(socket_factory=_make_socket, **options)


def _make_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, *_ = address
    sock = socket.socket(family=family, type=kind, proto=protocol)
    sock.setblocking(False)
    notice_silence(sock)
    return sock
