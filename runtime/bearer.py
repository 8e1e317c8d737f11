"""The one reader of `Authorization: Bearer …` (RFC 6750). Pure.

Rules this file keeps: the scheme is read in any case and with any number of spaces after it; of any
other scheme, and without one, there is no token.
"""

from __future__ import annotations


def token_of(header: bytes) -> bytes:
    """The token of an Authorization header's value; b"" where it has none."""
    scheme, _, token = header.strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""
