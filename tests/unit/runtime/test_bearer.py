"""What is a bearer token, in whatever way it was written."""

from __future__ import annotations

import pytest

from runtime.bearer import token_of


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (b"Bearer abc", b"abc"),
        (b"bearer abc", b"abc"),
        (b"bEaReR abc", b"abc"),
        (b"  Bearer   abc  ", b"abc"),
        (b"Bearer \tabc\t", b"abc"),
        (b"Bearer a b", b"a b"),  # nobody's token: it is compared whole
        (b"Bearer \xff\xc3\xa4", b"\xff\xc3\xa4"),
        (b"Bearer Bearer", b"Bearer"),
        (b"", b""),
        (b" ", b""),
        (b"abc", b""),
        (b"Bearer", b""),
        (b"Bearer ", b""),
        (b"Bearerabc", b""),
        (b"Bearer\tabc", b""),
        (b"Basic abc", b""),
        (b"Token abc", b""),
        (b"\xff abc", b""),
    ],
)
def test_the_token_of_a_header(header: bytes, token: bytes) -> None:
    assert token_of(header) == token
