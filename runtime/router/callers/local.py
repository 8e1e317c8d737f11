"""Whether a call without a key comes from this host itself. Pure.

A router on a loopback address lets callers in without a key, as only this host reaches it. But a
browser on this host carries out what any site says, and a proxy on it speaks for the internet.

Rules this file keeps:
- the name that was called is one of this host's, so that no name of another site leads here (DNS
  rebinding);
- a page of another site is not the caller (`Origin`), and nobody speaks for another (`Forwarded`
  and its like).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

FOREIGN = frozenset(
    {
        b"origin", b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto",
        b"x-real-ip",
    }
)  # fmt: skip
_KNOWN = 64  # values of Host that are remembered


class Local:
    """`allowed`: names beside localhost that lead here (`router.allowed_hosts`)."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(name.lower() for name in allowed)
        self._good: set[bytes] = set()

    def is_good(self, host: bytes) -> bool:
        """Whether that value of `Host` is this host's: one look-up once it was asked for."""
        if host in self._good:
            return True
        good = self._is_ours(_name(host.decode("latin-1")))
        if good and len(self._good) < _KNOWN:
            self._good.add(host)
        return good

    def problem(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Why a call without a key is refused; None: it comes from here."""
        for name, value in headers:
            lower = name.lower()
            if lower == b"host" and not self.is_good(value):
                return "its Host is not a name of this one (router.allowed_hosts)"
            if lower == b"origin":
                if not self._is_ours(_name_in(value.decode("latin-1"))):
                    return "its Origin is another site (router.allowed_hosts)"
            elif lower in FOREIGN:
                return f"a proxy sent it on ({name.decode('latin-1')})"
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self._allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False


def _name(host: str) -> str:
    """`Host`, or the authority of a URL, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _name_in(origin: str) -> str:
    try:
        return _name(urlsplit(origin).netloc)
    except ValueError:
        return ""
