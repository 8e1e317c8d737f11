"""Multipart forms: one model, rewritten; whatever is odd is refused in words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.outside import OutsideError
from runtime.router.call.body import takes_form
from runtime.router.call.errors import CallError
from runtime.router.call.multipart import PARTS, Data, FormReader, Part, read_form

KIND = "multipart/form-data; boundary=XB"
MODEL = b'Content-Disposition: form-data; name="model"'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'


def form(*parts: tuple[bytes, bytes], boundary: bytes = b"XB") -> bytes:
    """Parts by their headers and contents."""
    dashes = b"--" + boundary
    body = b"".join(dashes + b"\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + dashes + b"--\r\n"


def refused(body: bytes, kind: str = KIND) -> str:
    with pytest.raises(OutsideError) as caught:
        read_form(body, kind)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 64 * 1024, 128 * 1024, 1024 * 1024, 30 * 1024 * 1024])
@pytest.mark.parametrize("first", ["model", "file"])
def test_a_form_of_any_size_is_read(size: int, first: str) -> None:
    parts = [(MODEL, b"whisper"), (FILE, b"\r\n--X\x00\xff"[: size % 8] + bytes(size))]
    body = form(*(parts if first == "model" else parts[::-1]))
    read = read_form(body, KIND)
    assert (read.model, read.stream) == ("whisper", False)
    assert read.with_model("whisper") is body  # not a byte is copied
    assert read.with_model("other") == body.replace(b"whisper", b"other")


@pytest.mark.parametrize(
    "head",
    [
        MODEL,
        b"content-disposition: form-data; name=model",  # .NET
        MODEL + b"\r\nContent-Type: text/plain; charset=utf-8",
        MODEL + b"\r\nContent-Type: text/plain",
        MODEL + b"\r\nContent-Length: 3",
        b"Content-Type: text/plain\r\n" + MODEL,
        b'Content-Disposition: Form-Data;name="model"',
    ],
)
def test_the_model_is_rewritten(head: bytes) -> None:
    empty = (b'Content-Disposition: form-data; name="z"', b"")
    read = read_form(form((FILE, b"x"), (head, b" old\r\n"), empty), KIND)
    assert read.model == "old"
    assert read.with_model("new") == form((FILE, b"x"), (MODEL, b"new"), empty)


def test_a_model_that_is_missing_is_added() -> None:
    read = read_form(form((FILE, b"model")), KIND)
    assert read.model == ""
    assert read.with_model("m") == form((MODEL, b"m"), (FILE, b"model"))


@pytest.mark.parametrize("filename", [b"model", b'a\\"; name=\\"model', b"a;name=model", b"%22"])
def test_a_file_may_be_called_anything(filename: bytes) -> None:
    head = b'Content-Disposition: form-data; name="file"; filename="%b"' % filename
    assert read_form(form((head, b"x"), (MODEL, b"m")), KIND).model == "m"


SECRET = b"secret"
ODD = {
    "has 2 fields model": MODEL,
    "two headers content-disposition": MODEL + b"\r\n" + MODEL,
    "odd Content-Disposition": b'Content-Disposition: form-data; name = "model"',
    "odd Content-Disposition ": b'Content-Disposition: attachment; name="model"',
    "odd Content-Disposition  ": b"Content-Disposition: form-data; name*=utf-8''model",
    "odd Content-Disposition   ": b'Content-Disposition: form-data; x="a;b"; name="model"; y=1',
    "odd Content-Disposition    ": b'Content-Disposition: form-data; name="mo\\del"',
    "odd Content-Disposition     ": b'Content-Disposition:form-data;\tname = "model"',
    "odd Content-Disposition      ": b"Content-Disposition: form-data; name=model ; a=b",
    "odd Content-Disposition       ": b'Content-Disposition: form-data; name="x"; name="model"',
    "odd Content-Disposition        ": b'Content-Disposition: form-data; name=""',
    "odd Content-Disposition         ": b"Content-Disposition: form-data",
    "cannot be read": b'Content-Disposition: form-data;\r\n name="model"',  # folded
    "cannot be read ": b' Content-Disposition: form-data; name="model"',
    "a control character": b'Content-Disposition: form-data; name="x"\nx: y; name="model"',
    "without a Content-Disposition": b"Content-Type: text/plain",
    "another multipart body": MODEL + b"\r\nContent-Type: multipart/mixed; boundary=YB",
    "Content-Transfer-Encoding": MODEL + b"\r\nContent-Transfer-Encoding: base64",
    "not in UTF-8": b'Content-Disposition: form-data; name="mod\xffel"',
    "name is too long": b'Content-Disposition: form-data; name="%b"' % (b"m" * 300),
}


@pytest.mark.parametrize(("words", "head"), ODD.items())
def test_an_odd_part_is_refused_and_called_odd(words: str, head: bytes) -> None:
    assert words.strip() in refused(form((MODEL, b"m"), (FILE, b"x"), (head, SECRET)))


@pytest.mark.parametrize("charset", [b"utf-16", b"latin-1"])
def test_a_model_in_another_charset_is_refused(charset: bytes) -> None:
    head = MODEL + b"\r\nContent-Type: text/plain; charset=" + charset
    assert "field model with an odd Content-Type" in refused(form((head, b"m")))
    for name in (b'; filename="a"', b"; filename*=utf-8''a"):
        assert "has a file as its field model" in refused(form((MODEL + name, b"m")))
    assert "not in UTF-8" in refused(form((MODEL, b"\xff")))
    assert "has an empty field model" in refused(form((MODEL, b"")))
    assert "has a field model of 2000 bytes" in refused(form((MODEL, b"m" * 2000)))


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/mixed; boundary=XB",
        "multipart/form-data; boundary=XB; boundary=YB",
        "multipart/form-data; boundary=XB; x=1",
        "multipart/form-data; boundary=XB; charset=utf-16",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="X\\B"',
        "multipart/form-data; boundary*=utf-8''XB",
        "multipart/form-data; boundary=" + "X" * 71,
        "multipart/form-data, x; boundary=XB",
        "",
    ],
)
def test_an_odd_content_type_is_refused(kind: str) -> None:
    assert refused(form((MODEL, b"m")), kind)


@pytest.mark.parametrize(
    "kind", ["Multipart/Form-Data; Boundary=XB", 'multipart/form-data;boundary="XB"',
             "multipart/form-data; charset=utf-8; boundary=XB"],
)  # fmt: skip
def test_usual_ways_to_write_it_are_read(kind: str) -> None:
    assert read_form(form((MODEL, b"m")), kind).model == "m"


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 20, 60])
def test_a_form_that_breaks_off_is_refused(cut: int) -> None:
    body = form((MODEL, b"m"), (FILE, b"x" * 100)).removesuffix(b"\r\n")
    assert "final boundary" in refused(body[:-cut])


def test_what_stands_outside_of_the_boundaries_is_refused() -> None:
    body = form((MODEL, b"m"))
    assert "begin with its boundary" in refused(b"x\r\n" + body)
    assert "begin with its boundary" in refused(b"\r\nx" + body)
    assert "final boundary" in refused(body + b"x")
    assert "final boundary" in refused(body + form((MODEL, SECRET), boundary=b"YB"))


def test_a_form_of_many_parts_is_refused() -> None:
    parts = [(b'Content-Disposition: form-data; name="x"', b"")] * (PARTS + 1)
    assert f"more than {PARTS} parts" in refused(form(*parts))
    heads = b"\r\n".join(b"X-%d: a" % i for i in range(100))
    assert "cannot be read" in refused(form((heads + b"\r\n" + MODEL, b"")))
    assert "cannot be read" in refused(form((b"X: " + b"a" * 5000 + b"\r\n" + MODEL, b"")))


def pieces_of(body: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[a:b] for a, b in itertools.pairwise(at)]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10_000), max_size=8), st.binary(max_size=300))
def test_a_form_says_the_same_however_it_is_cut(cuts: list[int], content: bytes) -> None:
    body = form((MODEL, b"m"), (FILE, content))
    reader = FormReader(KIND)
    parts: list[list[Any]] = []  # name, file name, bytes
    for piece in pieces_of(body, cuts):
        for event in reader.feed(piece):
            if isinstance(event, Part):
                parts.append([event.name, event.filename, b""])
            else:
                assert isinstance(event, Data)
                parts[-1][2] += event.of[event.begin : event.end]
    reader.end()
    if b"\r\n--XB" not in b"\r\n" + content + b"\r\n":
        assert parts == [["model", None, b"m"], ["file", "a.wav", content]]


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_form_or_refused(data: bytes) -> None:
    for body in (data, b"--XB\r\n" + data, form((MODEL, data)), form((data, b"x"), (MODEL, b"m"))):
        try:
            read = read_form(body, KIND)
        except OutsideError:
            continue
        assert read_form(read.with_model("n"), KIND).model == "n"


@pytest.mark.parametrize(
    ("types", "path", "wanted"),
    [
        (["application/json"], "/v1/completions", False),
        (["Application/JSON; charset=utf-8"], "/v1/embeddings?x=1", False),
        ([KIND], "/v1/audio/transcriptions", True),
        ([KIND], "/v1/new/thing", True),
        (["application/json"], "/v1/new/thing", False),
    ],
)
def test_a_path_takes_json_or_a_form(types: list[str], path: str, wanted: bool) -> None:
    assert takes_form(types, path) is wanted


@pytest.mark.parametrize(
    ("types", "path"),
    [
        ([], "/v1/completions"),
        ([""], "/v1/completions"),
        (["text/plain"], "/v1/chat/completions"),
        (["application/x-www-form-urlencoded"], "/tokenize"),
        (["application/json ; charset=utf-8"], "/v1/completions"),  # nor does vLLM take it
        (["application/json", "application/json"], "/v1/completions"),
        ([KIND], "/v1/completions"),
        (["application/json"], "/v1/audio/transcriptions"),
        (["application/x-www-form-urlencoded"], "/v1/audio/translations"),
        (["text/plain"], "/v1/new/thing"),
    ],
)
def test_what_the_engine_would_refuse_is_refused_here(types: list[str], path: str) -> None:
    with pytest.raises(CallError) as caught:
        takes_form(types, path)
    assert caught.value.status == 400
    assert "Content-Type" in caught.value.message or "Media Type" in caught.value.message
