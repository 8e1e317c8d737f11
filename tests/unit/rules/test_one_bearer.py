"""A token is read in one place, runtime/bearer.py: four places read it in four ways.

One took `bearer` in lower case, one several spaces, one a token without a scheme, one none of them.
"""

from __future__ import annotations

import re

import pytest

from tests.unit.rules.product import sources, text

READS = re.compile(
    r"""\.(get|getall)\(\s*b?["']Authorization["']"""
    r"""|removeprefix\(b?["']Bearer|[=!]=\s*b?["']bearer ?["']""",
    re.IGNORECASE,
)
ALLOWED = {
    "runtime/bearer.py": 1,
    "runtime/engine/stub/server.py": 1,  # hands the header to the guard as it is
    "runtime/router/callers/keys.py": 1,  # callers may leave the scheme out
}


def own_ways(source: str) -> int:
    """How many places of a file read a token without `token_of`."""
    lines = [line for line in source.splitlines() if READS.search(line)]
    return sum("token_of(" not in line for line in lines)


@pytest.mark.parametrize("path", sources())
def test_tokens_are_read_in_one_place(path: str) -> None:
    assert own_ways(text(path)) == ALLOWED.get(path, 0), "use runtime.bearer.token_of"


@pytest.mark.parametrize(
    "planted",
    [
        'token = request.headers.get("Authorization", "").removeprefix("Bearer ")',
        'given = request.headers.get("Authorization", "").encode()',
        'scheme.lower() == b"bearer"',
        "if value.removeprefix(b'Bearer ') == token:",
    ],
)
def test_a_second_way_is_found(planted: str) -> None:
    assert own_ways(planted) == 1
    assert own_ways('token_of(header(request.headers.get("Authorization", "")))') == 0
