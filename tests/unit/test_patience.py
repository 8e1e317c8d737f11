"""How long callers wait, by their headers."""

from __future__ import annotations

import pytest

from runtime.router.patience import patience_s


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
        ({b"x-stainless-read-timeout": b"600.0"}, False, 600.0),
        ({b"X-Stainless-Read-Timeout": b"2.5"}, True, None),
        ({b"X-Stainless-Read-Timeout": b"nan"}, False, None),
        ({b"X-Stainless-Read-Timeout": b"-1"}, False, None),
        ({b"Prefer": b"wait=10", b"X-Stainless-Read-Timeout": b"3"}, False, 3.0),
    ],
)
def test_patience(headers: dict[bytes, bytes], streams: bool, expected: float | None) -> None:
    assert patience_s(headers.items(), streams) == expected
