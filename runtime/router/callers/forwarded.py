"""Who a call came from, where a proxy in front of the router says so. Pure.

Rule this file keeps: `X-Forwarded-For` counts as far as trusted proxies wrote it, from its end on;
what a caller wrote into it names nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

_NAME = b"x-forwarded-for"


class Forwarded:
    """`trusted`: addresses and networks of proxies (`router.trusted_proxies`)."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = tuple(map(_network, trusted))

    def address(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The caller's address; `peer` is who is connected.

        Example: with 127.0.0.1 trusted, "1.1.1.1, 2.2.2.2" from 127.0.0.1 is a call of 2.2.2.2.
        """
        if not self._trusted or not self._is_trusted(peer):
            return peer
        lines = [value for name, value in headers if name.lower() == _NAME]
        found = peer
        for hop in reversed(b",".join(lines).decode("latin-1").split(",")):
            address = _address(hop.strip())
            if address is None or "%" in hop:  # what follows it is any text
                break
            found = str(address)
            if not self._is_trusted(found):
                break
        return found

    def _is_trusted(self, address: str) -> bool:
        found = _address(address)
        return found is not None and any(found in network for network in self._trusted)


def _network(text: str) -> IPv4Network | IPv6Network:
    """As `_address` has its addresses: an IPv4 network however it is written."""
    found = ip_network(text)
    mapped = _address(str(found.network_address))
    if isinstance(found, IPv6Network) and isinstance(mapped, IPv4Address) and found.prefixlen >= 96:
        return IPv4Network((mapped, found.prefixlen - 96))
    return found


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text)
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped  # an IPv4 peer of a socket that listens on ::
    return found
