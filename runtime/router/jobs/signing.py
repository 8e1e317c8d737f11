"""Signed webhooks as the Standard Webhooks specification has them, and where they may go. Pure.

Rules this file keeps:
- a secret is in no message;
- nothing is signed with the master key: each tenant has one of its own, of which no other can be
  computed;
- an address is refused unless it is one of the public internet: not loopback, link-local, private,
  multicast, reserved, or one that hides such an IPv4 address in an IPv6 one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from runtime.places import is_numeric

MIN_KEY_BYTES = 24
MAX_URL = 2048
_PREFIX = "whsec_"
_DERIVES = b"stoker-webhook-v1\0"  # what the master key is used for, apart from all other uses
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_HIDES_IPV4 = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"), ip_network("2002::/16"))


def key_of(secret: str) -> bytes:
    """The key that `router.webhook_secret` stands for. Raises ValueError, without the secret."""
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(
            f"must be base64 of at least {MIN_KEY_BYTES} bytes, e.g. what `openssl rand -base64 32`"
            f" prints; it may begin with {_PREFIX}"
        )
    return key


def tenant_key(master: bytes, tenant: str) -> bytes:
    """The key that one tenant's webhooks are signed with; `master`: see `key_of`."""
    return hmac.digest(master, _DERIVES + tenant.encode(), hashlib.sha256)


def secret_of(key: bytes) -> str:
    """A key as its receiver enters it: the inverse of `key_of`."""
    return _PREFIX + base64.b64encode(key).decode()


def headers(key: bytes, hook_id: str, now: float, body: bytes) -> dict[str, str]:
    """The three headers that prove whose `body` it is and when it was sent."""
    stamp = str(int(now))
    signed = b".".join((hook_id.encode(), stamp.encode(), body))
    digest = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return {
        "webhook-id": hook_id,
        "webhook-timestamp": stamp,
        "webhook-signature": f"v1,{digest}",
    }


def url_problem(url: str, private: bool) -> str | None:
    """Why a webhook may not go to `url`, as far as it says itself; None: it may."""
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        return f"must be at most {MAX_URL} printable ASCII characters"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"is not a URL: {error}"
    schemes = ("https", "http") if private else ("https",)
    if parts.scheme not in schemes or not host:
        return (
            f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)} and have a host"
        )
    if parts.username is not None or parts.password is not None:
        return "may not hold a user or a password"
    if private:
        return None
    host = host.removesuffix(".")
    if host == "localhost" or host.endswith(".localhost"):
        return "is on this host; set router.webhook_private to allow that"
    try:
        literal = ip_address(host)
    except ValueError:
        return _name_problem(host)
    return None if is_public(str(literal)) else "is not a public address (router.webhook_private)"


def _name_problem(host: str) -> str | None:
    """Why `host`, which is not a whole address, is not a name either; None: it is one, and what it
    resolves to is looked at when it is called."""
    if is_numeric(host):
        return "has an address in a short form; write all four numbers of it"
    if not _HOST.fullmatch(host):
        return "has a host that is not a name; use letters, digits, '-' and '.'"
    return None


def is_public(address: str) -> bool:
    """Whether it is an address of the public internet."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif any(found in network for network in _HIDES_IPV4):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved
