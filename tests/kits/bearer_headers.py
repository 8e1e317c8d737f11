"""Ways to send a token that are right, wrong or odd: every part of Stoker judges them alike."""

from __future__ import annotations

import asyncio


def cases(token: str) -> list[tuple[bytes, bool]]:
    """(header lines, whether they open what `token` opens). Of two headers the first counts."""
    good = token.encode()
    return [
        (b"Authorization: Bearer %b" % good, True),
        (b"authorization: bearer %b" % good, True),
        (b"AUTHORIZATION: BEARER %b" % good, True),
        (b"Authorization: Bearer    %b" % good, True),
        (b"Authorization:   Bearer %b  " % good, True),
        (b"Authorization: Bearer %b\r\nAuthorization: Bearer wrong" % good, True),
        (b"Authorization: Bearer wrong\r\nAuthorization: Bearer %b" % good, False),
        (b"X-Nothing: 1", False),
        (b"Authorization:", False),
        (b"Authorization: Bearer", False),
        (b"Authorization: Bearer ", False),
        (b"Authorization: Bearer%b" % good, False),
        (b"Authorization: Basic %b" % good, False),
        (b"Authorization: Token %b" % good, False),
        (b"Authorization: Bearer %b x" % good, False),
        (b"Authorization: Bearer %bx" % good, False),
        (b"Authorization: Bearer \xff", False),
        (b"Authorization: Bearer \xff%b" % good, False),
        (b"Authorization: Bearer %b\xc3\xa4" % good, False),
    ]


async def status_of(url: str, path: str, lines: bytes) -> int:
    """The status of a GET with these header lines, as they are."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    writer.write(head + lines + b"\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return int(answer.split(b" ", 2)[1])
