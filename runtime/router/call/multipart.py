"""Multipart forms, read by the library that vLLM's server reads them with. Pure.

Rules this file keeps:
- whatever two readers might read differently is refused, in words that say what is odd: the model
  that was checked is the model that the engine serves;
- the field `model` is rewritten; every other byte stays as it came;
- the work is linear: a form has at most PARTS parts, a part at most HEAD_BYTES of headers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from runtime.outside import OutsideError, name_problem

FORM_TYPE = "multipart/form-data"
PARTS = 256
HEAD_BYTES = 4096
_FIELD_BYTES = 1024  # of `model` and `stream`
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_KIND = re.compile(
    rf'multipart/form-data((?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|"[^"\\]*"))*)[ \t]*', re.I
)
_PARAMETER = re.compile(rf'({_TOKEN})=(?:"([^"\\]*)"|({_TOKEN}))')
_BOUNDARY = re.compile(r"[A-Za-z0-9'()+_,./:=?-][A-Za-z0-9'()+_,./:=? -]{0,69}(?<! )")
# What clients send: names quoted or not, file names with the escapes of curl.
_DISPOSITION = re.compile(
    rf'form-data((?:;[ ]?(?:name=(?:{_TOKEN}|"[^"\\]*")|filename=(?:{_TOKEN}|"(?:[^"\\]|\\.)*")'
    rf"|filename\*={_TOKEN}))+)",
    re.I,
)
_FILENAME = re.compile(r'filename=(?:"(?:[^"\\]|\\.)*"|[^;]*)')
_NAME = re.compile(rf'name=(?:"([^"\\]*)"|({_TOKEN}))')
_ENCODINGS = (b"7bit", b"8bit", b"binary")
_TEXT = re.compile(rb"text/plain(;[ ]?charset=\"?utf-?8\"?)?", re.I)


class Part(NamedTuple):
    """Where a part begins: what its headers say."""

    name: str
    filename: str | None
    is_text: bool  # it has no Content-Type, or that of a text in UTF-8
    head_at: int  # where its headers begin, in the piece that they begin in


class Data(NamedTuple):
    """Some of the last part's content: `of[begin:end]`, not copied."""

    of: bytes
    begin: int
    end: int


Event = Part | Data


class FormReader:
    """Reads a form that comes in pieces. Raises OutsideError, in words that follow "the form"."""

    def __init__(self, content_type: str) -> None:
        self.boundary = boundary_of(content_type)
        self._parser = MultipartParser(
            self.boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_head,
                "on_part_data": self._data,
                "on_end": self._end,
            },
            max_header_count=8,
            max_header_size=HEAD_BYTES,
        )
        self._events: list[Event] = []
        self._parts = 0
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_at = -1
        self._started = self._ended = False

    def feed(self, data: bytes) -> list[Event]:
        """What the next piece holds."""
        if not self._started and data:
            self._started = True
            if data[:1] != b"-":  # the parser would skip what is before its boundary
                raise OutsideError("does not begin with its boundary")
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise OutsideError(f"cannot be read: {error}") from None
        events, self._events = self._events, []
        return events

    def end(self) -> None:
        """There is no more."""
        if not self._ended:
            raise OutsideError("has no final boundary: it broke off, or its boundary is another")

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > PARTS:
            raise OutsideError(f"has more than {PARTS} parts")
        self._headers = {}
        self._head_at = -1

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        if self._head_at < 0:
            self._head_at = start
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        name, value = self._name.lower(), self._value
        self._name = self._value = b""
        shown = name.decode()
        if name in self._headers:
            raise OutsideError(f"has a part with two headers {shown}")
        if any(byte < 32 and byte != 9 for byte in value):
            raise OutsideError(f"has a part whose header {shown} holds a control character")
        if name == b"content-transfer-encoding" and value.lower() not in _ENCODINGS:
            raise OutsideError("has a part with a Content-Transfer-Encoding: send it as it is")
        if name == b"content-type" and value.lower().startswith(b"multipart/"):
            raise OutsideError("holds another multipart body")
        self._headers[name] = value

    def _end_head(self) -> None:
        name, filename = _disposition(self._headers.get(b"content-disposition"))
        kind = self._headers.get(b"content-type")
        is_text = kind is None or _TEXT.fullmatch(kind) is not None
        self._events.append(Part(name, filename, is_text, self._head_at))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(Data(data, start, end))

    def _end(self) -> None:
        self._ended = True


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names. Raises OutsideError."""
    kind = _KIND.fullmatch(content_type)
    if kind is None:
        raise OutsideError(f"has an odd Content-Type: send {FORM_TYPE}; boundary=…")
    found = {"boundary": "", "charset": "utf-8"}
    names = [match[1].lower() for match in _PARAMETER.finditer(kind[1])]
    for match in _PARAMETER.finditer(kind[1]):
        found[match[1].lower()] = match[2] if match[2] is not None else match[3]
    if sorted(names) not in (["boundary"], ["boundary", "charset"]):
        raise OutsideError("has a Content-Type with other parameters than one boundary")
    if found["charset"].lower() not in ("utf-8", "utf8"):
        raise OutsideError(f"has the charset {found['charset'][:40]!r}: send it in UTF-8")
    boundary = found["boundary"].encode("latin-1", "replace")
    seen = parse_options_header(content_type)[1].get(b"boundary")  # as vLLM's server sees it
    if not _BOUNDARY.fullmatch(found["boundary"]) or seen != boundary:
        raise OutsideError("has an invalid boundary; write 1 to 70 letters, digits or '()+_,-./:=?")
    return boundary


def _disposition(value: bytes | None) -> tuple[str, str | None]:
    """Name and file name of a part."""
    if value is None:
        raise OutsideError("has a part without a Content-Disposition")
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise OutsideError("has a part whose Content-Disposition is not in UTF-8") from None
    found = _DISPOSITION.fullmatch(text)
    names = _NAME.findall(_FILENAME.sub("", text)) if found else []
    kind, seen = parse_options_header(text.encode().decode("latin-1"))  # as vLLM's server sees it
    name = "".join(names[0]) if names else ""
    if not name or len(names) != 1 or kind != b"form-data" or seen.get(b"name") != name.encode():
        raise OutsideError(
            f"has a part with an odd Content-Disposition ({text[:80]!r}): write"
            ' form-data; name="…", or form-data; name="…"; filename="…"'
        )
    if problem := name_problem(name):
        raise OutsideError(f"has a field whose name is too long: it {problem}")
    filename = seen.get(b"filename")
    named = filename is not None or "filename*=" in text
    return name, (filename or b"").decode(errors="replace") if named else None


@dataclass(slots=True)
class Form:
    """A whole form that has been read."""

    body: bytes
    boundary: bytes
    model: str  # "": it names none
    stream: bool
    _span: tuple[int, int] | None = None  # of the part `model`: from its headers to its value's end

    def with_model(self, model: str) -> bytes:
        """The body with that model and no other."""
        part = b'Content-Disposition: form-data; name="model"\r\n\r\n' + model.encode()
        if self._span is None:
            return b"--" + self.boundary + b"\r\n" + part + b"\r\n" + self.body
        begin, end = self._span
        if self.body[begin:end] == part:
            return self.body
        return b"".join((self.body[:begin], part, self.body[end:]))


def read_form(body: bytes, content_type: str) -> Form:
    """A whole form. Raises OutsideError."""
    reader = FormReader(content_type)
    if not body.rstrip(b"\r\n").endswith(b"--" + reader.boundary + b"--"):
        raise OutsideError("does not end with its final boundary: it broke off, or has another")
    events = reader.feed(body)
    reader.end()
    model, stream = _field(events, "model"), _field(events, "stream")
    said = "" if model is None else model.value.strip()
    return Form(
        body, reader.boundary, said,
        stream is not None and stream.value.strip().lower() in ("true", "1"),
        None if model is None else (model.begin, model.end),
    )  # fmt: skip


class _Field(NamedTuple):
    """A field's value, and where the whole part stands."""

    value: str
    begin: int
    end: int


def _field(events: list[Event], name: str) -> _Field | None:
    """The one field of that name; None: there is none."""
    found = [i for i, e in enumerate(events) if isinstance(e, Part) and e.name == name]
    if not found:
        return None
    if len(found) > 1:
        raise OutsideError(f"has {len(found)} fields {name}: send one")
    part, data = events[found[0]], events[found[0] + 1 : found[0] + 2]
    assert isinstance(part, Part)
    if part.filename is not None:
        raise OutsideError(f"has a file as its field {name}: send a text")
    if not part.is_text:
        raise OutsideError(f"has a field {name} with an odd Content-Type: leave it out")
    if not data or not isinstance(data[0], Data):
        raise OutsideError(f"has an empty field {name}")
    _, begin, end = data[0]
    if end - begin > _FIELD_BYTES:
        raise OutsideError(
            f"has a field {name} of {end - begin} bytes: it has at most {_FIELD_BYTES}"
        )
    try:
        return _Field(data[0].of[begin:end].decode(), part.head_at, end)
    except UnicodeDecodeError:
        raise OutsideError(f"has a field {name} that is not in UTF-8") from None
