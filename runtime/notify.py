"""Tells systemd that a service is ready (sd_notify(3)); without systemd, nothing."""

from __future__ import annotations

import os
import socket


def ready() -> None:
    """Send READY=1 to $NOTIFY_SOCKET, and let no child inherit it. Raises OSError."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(b"READY=1", address)
