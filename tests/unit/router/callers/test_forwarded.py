"""Whose call it is, behind proxies."""

from __future__ import annotations

import pytest

from runtime.router.callers.forwarded import Forwarded

TRUSTED = ("127.0.0.1", "10.0.0.0/8", "fd00::/8")


@pytest.mark.parametrize(
    ("peer", "lines", "address"),
    [
        ("127.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("127.0.0.1", ["1.1.1.1, 192.0.2.7"], "192.0.2.7"),  # the first word is the caller's own
        ("127.0.0.1", ["192.0.2.7, 10.1.2.3"], "192.0.2.7"),  # two proxies
        ("127.0.0.1", ["1.1.1.1", "192.0.2.7,10.1.2.3"], "192.0.2.7"),  # two lines
        ("127.0.0.1", ["10.1.2.3"], "10.1.2.3"),  # a call of a proxy's host itself
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", ["unknown"], "127.0.0.1"),
        ("127.0.0.1", ["1.1.1.1, \xff, 10.1.2.3"], "10.1.2.3"),
        ("::ffff:127.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("fd00::1", ["fd00::7%any text"], "fd00::1"),  # a zone is its own host's word
        ("fd00::1%eth0", ["2001:db8::7"], "2001:db8::7"),
        ("192.0.2.9", ["192.0.2.7"], "192.0.2.9"),  # whoever calls without a proxy
        ("", ["192.0.2.7"], ""),  # a Unix socket
    ],
)
def test_what_trusted_proxies_wrote_counts(peer: str, lines: list[str], address: str) -> None:
    headers = [(b"Host", b"x"), *((b"X-Forwarded-For", v.encode("latin-1")) for v in lines)]
    assert Forwarded(TRUSTED).address(peer, headers) == address


@pytest.mark.parametrize("trusted", ["::ffff:10.0.0.9", "::ffff:10.0.0.0/104"])
@pytest.mark.parametrize("peer", ["::ffff:10.0.0.9", "10.0.0.9"])
def test_an_ipv4_proxy_may_be_named_as_the_log_of_a_socket_on_both_has_it(trusted, peer) -> None:
    headers = [(b"X-Forwarded-For", b"192.0.2.7")]
    assert Forwarded((trusted,)).address(peer, headers) == "192.0.2.7"
    assert Forwarded((trusted,)).address("192.0.2.9", headers) == "192.0.2.9"


def test_nobody_is_trusted_by_default() -> None:
    assert Forwarded().address("127.0.0.1", [(b"X-Forwarded-For", b"192.0.2.7")]) == "127.0.0.1"
