"""How long callers wait, by their headers."""

from __future__ import annotations

import pytest

from runtime.router.callers.caller_timeout import patience


@pytest.mark.parametrize(
    ("headers", "streams", "expected"),
    [
        ({}, False, None),
        ({b"Prefer": b"wait=10"}, False, 10.0),
        ({b"Prefer": b"respond-async, wait=10"}, True, 10.0),
        ({b"prefer": b"handling=lenient; WAIT=7, x"}, False, 7.0),
        ({b"Prefer": b"await=10"}, False, None),
        ({b"Prefer": b"wait=ten"}, False, None),
        ({b"Prefer": b"wait=99999999"}, False, None),
        ({b"x-stainless-read-timeout": b"600.0"}, False, 599.5),
        ({b"X-Stainless-Timeout": b"600"}, False, 599.5),
        ({b"X-Stainless-Timeout": b"NOT_GIVEN"}, False, None),
        ({b"X-Stainless-Timeout": b"0"}, False, None),  # Node's clients: less than a second
        ({b"X-Stainless-Timeout": b"60"}, True, None),
        ({b"X-Stainless-Read-Timeout": b"2.5"}, True, None),
        ({b"X-Stainless-Read-Timeout": b"nan"}, False, None),
        ({b"X-Stainless-Read-Timeout": b"-1"}, False, None),
        ({b"Prefer": b"wait=10", b"X-Stainless-Read-Timeout": b"3"}, False, 2.7),
        ({b"X-Stainless-Timeout": b"600", b"X-Stainless-Runtime": b"node"}, False, 299.5),
        ({b"X-Stainless-Timeout": b"600", b"X-Stainless-Runtime": b"deno"}, False, 599.5),
        ({b"X-Stainless-Timeout": b"60", b"X-Stainless-Runtime": b"node"}, False, 59.5),
        ({b"User-Agent": b"node"}, False, 299.5),  # fetch
        ({b"User-Agent": b"undici"}, False, 299.5),
        ({b"User-Agent": b"nodejs-thing/1"}, False, None),
        ({b"User-Agent": b"node"}, True, None),
    ],
)
def test_patience(headers: dict[bytes, bytes], streams: bool, expected: float | None) -> None:
    found = patience(headers.items(), streams)
    assert (found and found.wait_s) == expected


def test_the_limit_is_named_as_the_caller_knows_it() -> None:
    found = patience([(b"x-stainless-timeout", b"3")], streams=False)
    assert found == (2.7, "3s, as the request's header X-Stainless-Timeout says")
