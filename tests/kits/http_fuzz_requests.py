# ruff: noqa: E501 - tables of bytes, one case a line
"""Odd HTTP requests from a seed; always the same ones of one seed. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HEAD_BYTES = 256 * 1024
STRAY = b"stray-bytes"  # in whatever must never reach a caller or an engine
LAST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
EDGE = b"\r\n"


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


def chunk(data: bytes, extra: bytes = b"") -> bytes:
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
    draft.framed(b"Transfer-Encoding: " + draft.rng.choice(odd), chunk(draft.body) + b"0\r\n\r\n")
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
    body = chunk(draft.body[:at], extra) + chunk(draft.body[at:])
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


def base(rng: random.Random, path: bytes, model: str, mark: str) -> Draft:
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
        draft = base(rng, path, "m", f"case-{number}-0.")
        chosen = [MUTATIONS[number % len(MUTATIONS)]]
        chosen += [m for m in rng.sample(MUTATIONS, 2) if rng.random() < 0.2]
        for mutate in chosen:
            mutate(draft)
        data = draft.bytes()
        if draft.cut:
            data = data[: rng.randrange(1, len(data))]
        elif rng.random() < 0.3:
            data += base(rng, path, "m", f"case-{number}-1.").bytes()
        data += b"" if draft.cut else LAST
        if rng.random() < 0.2:
            data = base(rng, path, "m", f"case-{number}-2.").bytes() + data
        names = tuple(m.__name__ for m in chosen)
        yield Case(number, names, data, split(rng, data), draft.refuse, draft.cut)
