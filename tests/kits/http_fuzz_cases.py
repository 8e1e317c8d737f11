# ruff: noqa: E501 - tables of bytes, one case a line
"""Odd HTTP from a seed: requests, and engines' answers; always the same ones of one seed. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HEAD_BYTES = 256 * 1024
STRAY = b"stray-bytes"  # in whatever must never reach a caller or an engine
LAST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
EDGE = b"\r\n"


# -------------------------------------------------------------------------------- requests


@dataclass
class Draft:
    """A request before it is bytes; the mutations change it."""

    path: bytes
    mark: bytes
    rng: random.Random
    method: bytes = b"POST"
    version: bytes = b"HTTP/1.1"
    gap: bytes = b" "
    line: bytes | None = None
    headers: list[bytes] = field(default_factory=list)
    edge: bytes = EDGE
    body: bytes = b""
    before: bytes = b""
    after: bytes = b""
    refuse: bool = False  # RFC 9112 has it refused: no engine may see it
    cut: bool = False  # its end never comes

    def drop(self, name: bytes) -> None:
        self.headers = [h for h in self.headers if not h.lower().startswith(name + b":")]

    def add(self, *lines: bytes) -> None:
        for line in lines:
            self.headers.insert(self.rng.randrange(len(self.headers) + 1), line)

    def framed(self, line: bytes, body: bytes) -> None:
        self.drop(b"content-length")
        self.add(line)
        self.body = body
        self.refuse = False  # what another mutation said of the framing is gone

    def bytes(self) -> bytes:
        line = self.line
        if line is None:
            line = self.gap.join((self.method, self.path, self.version))
        head = self.edge.join((line, *self.headers, b"", b""))
        return self.before + head + self.body + self.after


@dataclass
class Case:
    """`data` goes out in `pieces`. `refused`: what is odd of it may reach no engine. `cut`: its
    end never comes."""

    number: int
    names: tuple[str, ...]
    data: bytes
    pieces: list[bytes]
    refused: bool = False
    cut: bool = False


Mutation = Callable[[Draft], None]
MUTATIONS: list[Mutation] = []


def _mutation(function: Mutation) -> Mutation:
    MUTATIONS.append(function)
    return function


def _chunk(data: bytes, extra: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extra, data)


def _stray(path: bytes) -> bytes:
    body = b'{"model":"m","prompt":"%b"}' % STRAY
    return (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (path, len(body), body)
    )


@_mutation
def plain(draft: Draft) -> None:
    pass


@_mutation
def length_and_chunks(draft: Draft) -> None:
    draft.add(draft.rng.choice((b"Transfer-Encoding: chunked", b"transfer-encoding:\tchunked")))
    draft.body = draft.rng.choice((b"0\r\n\r\n" + _stray(draft.path), draft.body))
    draft.refuse = True


@_mutation
def two_lengths(draft: Draft) -> None:
    draft.add(b"Content-Length: %d" % draft.rng.choice((0, 5, len(draft.body) + 40)))
    draft.refuse = True


@_mutation
def odd_length(draft: Draft) -> None:
    size = len(draft.body)
    odd = (b"+%d", b"-%d", b"%d, %d", b"0x%x", b"%d.0", b"%d a", b"", b"%d,", b"1%d" + b"0" * 30)
    text = draft.rng.choice(odd)
    draft.framed(b"Content-Length: " + text % ((size,) * text.count(b"%")), draft.body)
    draft.refuse = True


@_mutation
def odd_coding(draft: Draft) -> None:
    odd = (
        b"chunked, identity",
        b"xchunked",
        b"chunked\x0b",
        b"gzip",
        b"chunked, chunked",
        b'"chunked"',
    )
    draft.framed(b"Transfer-Encoding: " + draft.rng.choice(odd), _chunk(draft.body) + b"0\r\n\r\n")
    draft.refuse = True


@_mutation
def two_codings(draft: Draft) -> None:
    draft.framed(b"Transfer-Encoding: chunked", b"0\r\n\r\n" + _stray(draft.path))
    draft.add(b"Transfer-Encoding: " + draft.rng.choice((b"identity", b"cow", b"chunked")))
    draft.refuse = True


@_mutation
def chunked(draft: Draft) -> None:
    at = draft.rng.randrange(1, len(draft.body))
    extra = draft.rng.choice((b"", b";a=b", b';a="b c"', b";a"))
    body = _chunk(draft.body[:at], extra) + _chunk(draft.body[at:])
    # Not Content-Length: h11 takes such a trailer, llhttp refuses it, and both may.
    trailer = draft.rng.choice((b"", b"X-Trailer: a\r\n", b"Host: other\r\n"))
    draft.framed(b"Transfer-Encoding: chunked", body + b"0\r\n" + trailer + b"\r\n")


@_mutation
def odd_chunk_size(draft: Draft) -> None:
    odd = (
        b"+%x",
        b"-%x",
        b"0x%x",
        b"%xg",
        b" %x",
        b"%x\x00",
        b"1" * 17 + b"%x",
        b"",
        b"%x,",
        b"_%x",
    )
    text = draft.rng.choice(odd)
    size = text % ((len(draft.body),) * text.count(b"%"))
    body = size + EDGE + draft.body + EDGE + b"0\r\n\r\n"
    draft.framed(b"Transfer-Encoding: chunked", body)
    draft.refuse = True


@_mutation
def odd_chunk_edge(draft: Draft) -> None:
    size = b"%x" % len(draft.body)
    odd = (
        size + b"\n" + draft.body + b"\r\n0\r\n\r\n",
        size + b"\r" + draft.body + b"\r\n0\r\n\r\n",
        size + b"\r\n" + draft.body + b"XX0\r\n\r\n",
        size + b"\r\n" + draft.body + b"0\r\n\r\n",
        size + b";a\nb\r\n" + draft.body + b"\r\n0\r\n\r\n",
        size + b"\r\n" + draft.body + b"\r\n0\r\nbad trailer\r\n\r\n",
    )
    draft.framed(b"Transfer-Encoding: chunked", draft.rng.choice(odd))
    draft.refuse = True


@_mutation
def folded(draft: Draft) -> None:
    draft.add(b"X-Folded: a\r\n" + draft.rng.choice((b" ", b"\t")) + b"Transfer-Encoding: chunked")


@_mutation
def first_line_folded(draft: Draft) -> None:
    draft.headers.insert(0, b" X-Odd: a")
    draft.refuse = True


@_mutation
def bare_edges(draft: Draft) -> None:
    draft.edge = draft.rng.choice((b"\n", b"\r", b"\r\r\n", b"\n\r"))
    draft.refuse = draft.edge != b"\n"


@_mutation
def byte_in_name(draft: Draft) -> None:
    byte = draft.rng.choice((b" ", b"\t", b"\x00", b"\x0b", b"\r", b"\x80", b"(", b"@", b"\x7f"))
    draft.add(b"X-Odd%b: a" % byte, b"X%bY: a" % byte)
    draft.refuse = True


@_mutation
def space_before_colon(draft: Draft) -> None:
    draft.framed(
        draft.rng.choice((b"Content-Length : %d", b"Content-Length\t: %d")) % len(draft.body),
        draft.body,
    )
    draft.refuse = True


@_mutation
def byte_in_value(draft: Draft) -> None:
    byte = draft.rng.choice((b"\x00", b"\r", b"\rX: a", b"\nX\r\n"))
    draft.add(b"X-Odd: a%bb" % byte)
    draft.refuse = b"\n" not in byte or b"\r" in byte


@_mutation
def high_bytes_in_value(draft: Draft) -> None:
    draft.add(b"X-Odd: " + draft.rng.choice((b"\xff\xfe", "ä€".encode(), b"\x80", b"", b"a\tb")))


@_mutation
def no_colon(draft: Draft) -> None:
    draft.add(draft.rng.choice((b"X-Odd", b": a", b"=a")))
    draft.refuse = True


@_mutation
def hosts(draft: Draft) -> None:
    choice = draft.rng.randrange(5)
    if choice:
        draft.drop(b"host")
    others = ((b"Host: other",), (), (b"Host: a b",), (b"Host:",), (b"Host: 127.0.0.1, other",))
    draft.add(*others[choice])
    draft.refuse = True


@_mutation
def odd_target(draft: Draft) -> None:
    path = draft.path
    odd = (
        b"http://127.0.0.1" + path, b"http://other" + path, b"//other" + path, b"/..;" + path,
        b"/v1/../v1/completions", path + b"#a", path + b"?a=\xff", path + b"/%2e%2e/x", b"*",
        path.replace(b"/", b"\\"), b"127.0.0.1:80", path + b"\x00", path[1:], path + b"%00",
        path + b"%zz", b"http://[::1" + path, path + b"?" + b"q" * 9000, path + b"?a b", b"/" * 9000,
    )  # fmt: skip
    draft.path = draft.rng.choice(odd)


@_mutation
def odd_method(draft: Draft) -> None:
    # Not HEAD: of a request that cannot be read nobody knows that its answer has no body.
    odd = (
        b"post", b"PoST", b"POSTT", b"P" * 5000, b"PO\x00ST", b"POST\t", b"", b"GET",
        b"OPTIONS", b"CONNECT", b"TRACE", b"DELETE", b"PUT", b"PRI", b"M-SEARCH", b"X(", b"\xff",
    )  # fmt: skip
    draft.method = draft.rng.choice(odd)
    draft.refuse = True


@_mutation
def odd_version(draft: Draft) -> None:
    odd = (
        b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/3", b"HTTP/11", b"http/1.1", b"HTTP/1.1 x",
        b"HTTP/1,1", b"HTTP/-1.1", b"HTTPS/1.1", b"", b"\x00", b"HTTP/1.10",
    )  # fmt: skip  # not RTSP/1.0: llhttp takes it for HTTP/1.0, and nothing after it can tell
    draft.version = draft.rng.choice(odd)
    draft.refuse = draft.version != b"HTTP/1.2"


@_mutation
def version_1_0(draft: Draft) -> None:
    draft.version = b"HTTP/1.0"
    draft.refuse = False
    if draft.rng.random() < 0.5:
        draft.add(b"Connection: keep-alive")


@_mutation
def odd_line(draft: Draft) -> None:
    odd = (b"GET /", b"/", b"POST\t%b\tHTTP/1.1", b"POST %b", b" POST %b HTTP/1.1",
           b"POST %b HTTP/1.1 ", b"\x16\x03\x01\x02", b"PRI * HTTP/2.0", b"POST %b\r HTTP/1.1")  # fmt: skip
    text = draft.rng.choice(odd)
    draft.line = text % ((draft.path,) * text.count(b"%b"))
    draft.refuse = True


@_mutation
def empty_lines_before(draft: Draft) -> None:
    draft.before = draft.rng.choice((b"\r\n", b"\r\n\r\n", b"\n")) + draft.before


@_mutation
def expect(draft: Draft) -> None:
    draft.add(b"Expect: " + draft.rng.choice((b"100-continue", b"100-Continue", b"200-ok", b"")))


@_mutation
def upgrade(draft: Draft) -> None:
    draft.add(
        b"Connection: Upgrade", b"Upgrade: " + draft.rng.choice((b"h2c", b"websocket", b"a/1"))
    )
    draft.add(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13")


@_mutation
def hop_headers(draft: Draft) -> None:
    named = draft.rng.choice((b"X-Secret", b"x-secret, close", b"X-Secret, keep-alive", b"host, X-Secret",
                              b"content-length, x-secret", b"content-type, X-SECRET"))  # fmt: skip
    draft.add(b"X-Secret: " + STRAY, b"Connection: " + named, b"TE: trailers", b"Keep-Alive: 1")
    draft.add(b"Proxy-Connection: keep-alive", b"Proxy-Authorization: Basic " + STRAY)


@_mutation
def many_headers(draft: Draft) -> None:
    count = draft.rng.choice((90, 101, 129, 260, 1000))
    draft.add(*(b"X-%d: a" % n for n in range(count)))


@_mutation
def huge_header(draft: Draft) -> None:
    size = draft.rng.choice((8000, 8193, 16500, 70_000))
    draft.add(draft.rng.choice((b"X-Odd: " + b"a" * size, b"X" * size + b": a")))


@_mutation
def odd_content_type(draft: Draft) -> None:
    draft.drop(b"content-type")
    odd = (
        b"",
        b"text/plain",
        b"application/json; charset=\xff",
        b"multipart/form-data",
        b"a" * 3000,
    )
    draft.add(b"Content-Type: " + draft.rng.choice(odd))


@_mutation
def odd_encoding(draft: Draft) -> None:
    draft.add(
        b"Content-Encoding: " + draft.rng.choice((b"gzip", b"zstd", b"br", b"identity", b"x", b""))
    )


@_mutation
def bytes_after(draft: Draft) -> None:
    draft.after = draft.rng.choice((b"\r\n", b"\r\n\r\n", b"x", b"\x00" * 8, b"0\r\n\r\n"))


@_mutation
def short_length(draft: Draft) -> None:
    draft.framed(b"Content-Length: %d" % (len(draft.body) - 5), draft.body)


@_mutation
def cut_off(draft: Draft) -> None:
    draft.cut = True


def _base(rng: random.Random, path: bytes, model: str, mark: str) -> Draft:
    draft = Draft(path, mark.encode(), rng)
    draft.body = json.dumps({"model": model, "prompt": mark}).encode()
    draft.headers = [
        b"Host: 127.0.0.1", b"Content-Type: application/json",
        b"Content-Length: %d" % len(draft.body),
    ]  # fmt: skip
    return draft


def split(rng: random.Random, data: bytes) -> list[bytes]:
    """The bytes whole, in a few pieces, or (if they are few) one by one."""
    how = rng.random()
    if how < 0.4:
        return [data]
    if how < 0.55 and len(data) < 1200:
        return [data[n : n + 1] for n in range(len(data))]
    cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randint(1, 6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]


def requests(seed: int, count: int, path: bytes) -> Iterator[Case]:
    """Odd requests of model `m` to `path`. Some are pipelined after a good one on the same connection,
    and all but those cut off have `LAST` after them."""
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        draft = _base(rng, path, "m", f"case-{number}-0.")
        chosen = [MUTATIONS[number % len(MUTATIONS)]]
        chosen += [m for m in rng.sample(MUTATIONS, 2) if rng.random() < 0.2]
        for mutate in chosen:
            mutate(draft)
        data = draft.bytes()
        if draft.cut:
            data = data[: rng.randrange(1, len(data))]
        elif rng.random() < 0.3:
            data += _base(rng, path, "m", f"case-{number}-1.").bytes()
        data += b"" if draft.cut else LAST
        if rng.random() < 0.2:
            data = _base(rng, path, "m", f"case-{number}-2.").bytes() + data
        names = tuple(m.__name__ for m in chosen)
        yield Case(number, names, data, split(rng, data), draft.refuse, draft.cut)


# -------------------------------------------------------------------------------- answers


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
    chunks = _chunk(body[:at]) + _chunk(body[at:])

    def status(line: bytes, rest: bytes = kind + size + EDGE + body) -> tuple[bytes, str]:
        return line + EDGE + rest, "close"

    return {
        "good": (good, "keep"),
        "good_chunked": (te + b"\r\n" + chunks + b"0\r\n\r\n", "keep"),
        "good_until_close": (ok + b"\r\n" + body, "close"),
        "trailers": (te + b"\r\n" + chunks + b"0\r\nX-T: a\r\n\r\n", "keep"),
        "chunk_extension": (te + b"\r\n" + _chunk(body, b";a=b") + b"0\r\n\r\n", "keep"),
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
    return _base(random.Random(0), path, model, f"case-{answer.number}.").bytes() + LAST
