# ruff: noqa: E501 - tables of bytes, one case a line
"""Odd answers of engines from a seed; always the same ones of one seed. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.kits.http_fuzz_requests import EDGE, LAST, STRAY, base, chunk, split


@dataclass(frozen=True)
class Answer:
    """What an engine says to the request of case `number`, piece by piece, and how it ends:
    "keep", "close" or "reset"."""

    number: int
    name: str
    pieces: tuple[bytes, ...]
    end: str

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


def _answer_bytes(rng: random.Random, body: bytes) -> dict[str, tuple[bytes, str]]:
    """Each kind of odd answer, by name: its bytes and its end."""
    kind = b"Content-Type: application/json\r\n"
    ok, size = b"HTTP/1.1 200 OK\r\n" + kind, b"Content-Length: %d\r\n" % len(body)
    good, at = ok + size + b"\r\n" + body, rng.randrange(1, len(body))
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(STRAY) + STRAY
    te = ok + b"Transfer-Encoding: chunked\r\n"
    chunks = chunk(body[:at]) + chunk(body[at:])

    def status(line: bytes, rest: bytes = kind + size + EDGE + body) -> tuple[bytes, str]:
        return line + EDGE + rest, "close"

    return {
        "good": (good, "keep"),
        "good_chunked": (te + b"\r\n" + chunks + b"0\r\n\r\n", "keep"),
        "good_until_close": (ok + b"\r\n" + body, "close"),
        "trailers": (te + b"\r\n" + chunks + b"0\r\nX-T: a\r\n\r\n", "keep"),
        "chunk_extension": (te + b"\r\n" + chunk(body, b";a=b") + b"0\r\n\r\n", "keep"),
        "interim": (b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + good, "keep"),
        "many_interim": (b"HTTP/1.1 102 Processing\r\n\r\n" * 50 + good, "keep"),
        "switch": (b"HTTP/1.1 101 Switching\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n" + STRAY, "close"),
        "no_status_line": (body, "close"),
        "only_headers": (kind + size + b"\r\n" + body, "close"),
        "nothing": (b"", rng.choice(("close", "reset"))),
        "http_0_9": (b"<html>" + STRAY, "close"),
        "http_1_0": (good.replace(b"/1.1", b"/1.0", 1), "close"),
        "http_2": (good.replace(b"/1.1", b"/2.0", 1), "close"),
        "status_99": status(b"HTTP/1.1 99 Odd"),
        "status_000": status(b"HTTP/1.1 000 Odd"),
        "status_1000": status(b"HTTP/1.1 1000 Odd"),
        "status_word": status(b"HTTP/1.1 OK"),
        "status_negative": status(b"HTTP/1.1 -200 OK"),
        "status_599": status(b"HTTP/1.1 599 Odd"),
        "status_999": status(b"HTTP/1.1 999 Odd"),
        "status_204_body": status(b"HTTP/1.1 204 No", size + EDGE + STRAY),
        "status_304_body": status(b"HTTP/1.1 304 No", size + EDGE + STRAY),
        "status_205_body": status(b"HTTP/1.1 205 Reset"),
        "status_302": status(b"HTTP/1.1 302 Found\r\nLocation: http://other/"),
        "status_401": status(b"HTTP/1.1 401 No"),
        "status_500": status(b"HTTP/1.1 500 No"),
        "status_bytes": status(b"HTTP/1.1 200 \xff\xfe\x01"),
        "no_reason": status(b"HTTP/1.1 200"),
        "two_lengths": (ok + size + b"Content-Length: 2\r\n\r\n" + body, "close"),
        "same_length_twice": (ok + size + size + b"\r\n" + body, "close"),
        "length_and_chunks": (te + b"Content-Length: 3\r\n\r\n" + chunks + b"0\r\n\r\n", "close"),
        "odd_length": (ok + b"Content-Length: %b\r\n\r\n" % rng.choice((b"-1", b"a", b"1e3", b"+5", b"9" * 30, b"")) + body, "close"),
        "long_length": (ok + b"Content-Length: %d\r\n\r\n" % (len(body) + 9) + body, rng.choice(("close", "reset"))),
        "short_length": (ok + b"Content-Length: %d\r\n\r\n" % len(body) + body + STRAY, "keep"),
        "odd_chunk": (te + b"\r\n" + rng.choice((b"zz", b"-5", b"0x5", b"", b"f" * 20)) + b"\r\n" + body, "close"),
        "chunk_too_long": (te + b"\r\n" + b"%x\r\n%b" % (len(body) + 50, body), "close"),
        "chunk_edge": (te + b"\r\n" + b"%x\r\n%bXX0\r\n\r\n" % (len(body), body), "close"),
        "no_last_chunk": (te + b"\r\n" + chunks, rng.choice(("close", "reset"))),
        "odd_coding": (ok + b"Transfer-Encoding: %b\r\n\r\n" % rng.choice((b"gzip", b"chunked, a", b"x")) + chunks + b"0\r\n\r\n", "close"),
        "second_answer": (good + stray, "keep"),
        "second_after_close": (ok + size + b"Connection: close\r\n\r\n" + body + stray, "close"),
        "head_cut": (good[: rng.randrange(1, len(ok) + len(size))], rng.choice(("close", "reset"))),
        "body_cut": (good[: -rng.randrange(1, len(body))], rng.choice(("close", "reset"))),
        "huge_header": (ok + b"X-Odd: " + b"a" * 200_000 + b"\r\n" + size + b"\r\n" + body, "close"),
        "big_header": (ok + b"X-Odd: " + b"a" * 30_000 + b"\r\n" + size + b"\r\n" + body, "keep"),
        "many_headers": (ok + b"".join(b"X-%d: a\r\n" % n for n in range(20_000)) + size + b"\r\n" + body, "close"),
        "folded": (ok + b"X-Odd: a\r\n b\r\n" + size + b"\r\n" + body, "close"),
        "bare_edges": (good.replace(b"\r\n", rng.choice((b"\n", b"\r"))), "close"),
        "byte_in_name": (ok + b"X%bY: a\r\n" % rng.choice((b" ", b"\x00", b"\x80", b"\x0b")) + size + b"\r\n" + body, "close"),
        "byte_in_value": (ok + b"X-Odd: a%bb\r\n" % rng.choice((b"\x00", b"\r", b"\x0b", b"\x7f", b"\x01")) + size + b"\r\n" + body, "close"),
        "high_bytes": (ok + b"X-Odd: \xff\xe4\r\n" + size + b"\r\n" + body, "keep"),
        "no_colon": (ok + b"X-Odd\r\n" + size + b"\r\n" + body, "close"),
        "wrong_encoding": (ok + b"Content-Encoding: %b\r\n" % rng.choice((b"gzip", b"br", b"x")) + size + b"\r\n" + body, "keep"),
        "hop_headers": (ok + b"Connection: X-Secret, close\r\nX-Secret: a\r\nKeep-Alive: 9\r\n" + size + b"\r\n" + body, "close"),
        "wrong_kind": (good.replace(b"application/json", rng.choice((b"", b"\xff", b"text/html")), 1), "keep"),
        "empty_body": (ok + b"Content-Length: 0\r\n\r\n", "keep"),
        "random": (rng.randbytes(rng.randrange(1, 300)), "close"),
    }  # fmt: skip


def answers(seed: int, count: int) -> Iterator[Answer]:
    """Odd answers of an engine, each kind in turn."""
    for number in range(count):
        rng = random.Random(f"{seed}/answer/{number}")
        body = json.dumps(
            {"text": f"case-{number}.", "fill": "x" * rng.choice((0, 9, 5000))}
        ).encode()
        kinds = list(_answer_bytes(rng, body).items())
        name, (data, end) = kinds[number % len(kinds)]
        # What comes a moment after an answer's end is, for any client that keeps connections, the
        # answer to the next request: only bytes that come with the end can be told from it.
        whole = STRAY in data and end == "keep"
        pieces = [data] if whole else split(rng, data) if data else []
        yield Answer(number, name, tuple(pieces), end)


def question(answer: Answer, path: bytes, model: str) -> bytes:
    """A good request for it, and `LAST` after that."""
    return base(random.Random(0), path, model, f"case-{answer.number}.").bytes() + LAST
