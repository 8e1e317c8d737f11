"""Webhooks: how they are signed and where they may go."""

from __future__ import annotations

import base64
import socket
import time

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.jobs import signing

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_signature_is_that_of_the_specifications_own_example() -> None:
    """https://github.com/standard-webhooks/standard-webhooks, spec and reference libraries."""
    made = signing.headers(
        signing.key_of(SECRET),
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330.9,
        b'{"test": 2432232314}',
    )
    assert made == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_secret_may_come_without_its_prefix() -> None:
    assert signing.key_of(SECRET) == signing.key_of(SECRET.removeprefix("whsec_"))


@pytest.mark.parametrize("master", [SECRET, SECRET.removeprefix("whsec_")])
def test_a_tenants_key_is_the_hmac_that_openssl_computes(master: str) -> None:
    """printf 'stoker-webhook-v1\\0acme' | openssl dgst -sha256 -mac HMAC -macopt hexkey:31f2…"""
    key = signing.tenant_key(signing.key_of(master), "acme")
    assert signing.secret_of(key) == "whsec_PHlzxtWnAfII0EtxAi1ksdz+dLLJKNp83B2Ck839Zdc="
    assert signing.key_of(signing.secret_of(key)) == key


def test_no_tenant_verifies_what_was_signed_for_another() -> None:
    """By OpenAI's client, which gets what the tenant is given."""
    master, body = signing.key_of(SECRET), b'{"type": "job.completed"}'
    keys = [signing.tenant_key(master, name) for name in ("acme", "globex")]
    made = [signing.headers(key, "evt_1", time.time(), body) for key in keys]

    def verifies(key: bytes, headers: dict[str, str]) -> bool:
        client = openai.OpenAI(api_key="x", webhook_secret=signing.secret_of(key))
        try:
            client.webhooks.verify_signature(body, headers)
        except openai.InvalidWebhookSignatureError:
            return False
        return True

    taken = [[verifies(key, headers) for headers in made] for key in (*keys, master)]
    assert taken == [[True, False], [False, True], [False, False]]


@pytest.mark.parametrize("secret", ["hunter2-hunter2-hunter2-hunter2!", "c2hvcnQ=", "é"])
def test_a_bad_secret_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="openssl rand") as caught:
        signing.key_of(secret)
    assert secret not in str(caught.value)


def test_any_key_of_enough_bytes_will_do() -> None:
    assert signing.key_of(base64.b64encode(bytes(24)).decode()) == bytes(24)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "255.255.255.255", "224.0.0.1", "192.0.2.1", "::1", "::", "fe80::1%eth0",
        "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "nonsense", "",
    ],
)  # fmt: skip
def test_what_is_not_of_the_public_internet_is_refused(address: str) -> None:
    assert not signing.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_what_is_of_the_public_internet_is_taken(address: str) -> None:
    assert signing.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/", "ftp://x/", "https://", "https:///path", "//x", "x", "",
        "https://127.0.0.1/", "https://[::1]:8443/", "https://10.0.0.1", "https://localhost/",
        "https://a.localhost/", "https://u:p@example.com/", "https://example.com:99999/",
        "https://[bad/", "https://example.com/\r\nX: y", "https://ex ample.com/",
        "https://é.example/", "https://example.com/" + "x" * 2048,
    ],
)  # fmt: skip
def test_a_bad_url_is_refused(url: str) -> None:
    assert signing.url_problem(url, private=False) is not None


def test_good_urls() -> None:
    assert signing.url_problem("https://hooks.example.com:8443/a?b=c", private=False) is None
    assert signing.url_problem("http://127.0.0.1:9/", private=True) is None
    assert signing.url_problem("file:///etc/passwd", private=True) is not None


SHORT = [
    "2130706433", "0x7f000001", "0x7f.1", "0X7F.0.0.1", "127.1", "127.0.1", "0177.0.0.1", "0",
    "017700000001", "0x", "127.0.0.1.", "127.0.0.1..", "1.1", "8.8.8", "1.2.3.4.5", "256.1.1.1",
    "08.8.8.8", "a.b.127", "example.0x7f", "localhost.", "x.localhost.", "LOCALHOST", "127%2e0.0.1",
    "exam%70le.com", "a..b", ".a", "a" * 64, "*.com", "[::ffff:127.0.0.1]", "[::1]", "[::]",
]  # fmt: skip


@pytest.mark.parametrize("host", SHORT)
def test_an_address_in_another_form_is_no_webhook(host: str) -> None:
    """Without luck: an HTTP library may read such a host as an address, and ask no resolver."""
    for url in (f"https://{host}/", f"https://{host}:8443/x", f"https://{host.upper()}/"):
        assert signing.url_problem(url, private=False) is not None, url


@pytest.mark.parametrize(
    "host", ["hooks.example.com", "a-b.c0", "8.8.8.8", "example.com.", "x_y.de"]
)
def test_a_public_name_or_address_is_one(host: str) -> None:
    assert signing.url_problem(f"https://{host}/", private=False) is None


@given(st.integers(0, 2**32 - 1), st.sampled_from(["d", "#x", "#o"]), st.integers(1, 4))
def test_no_form_that_the_c_library_reads_is_let_in_unless_it_is_whole(
    value: int, form: str, parts: int
) -> None:
    """As inet_aton(3) has it: one to four numbers, each decimal, octal or hexadecimal."""
    numbers = [value >> (24 - 8 * n) & 255 for n in range(parts - 1)]
    numbers.append(value & (2 ** (32 - 8 * (parts - 1)) - 1))
    host = ".".join(f"0{n:o}" if form == "#o" else format(n, form) for n in numbers)
    assert socket.inet_aton(host) == value.to_bytes(4)
    whole = parts == 4 and form == "d"
    if not (whole and signing.is_public(host)):
        assert signing.url_problem(f"https://{host}/", private=False) is not None
