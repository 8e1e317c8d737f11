"""What is wrong with what came of a case of `http_fuzz_requests.py` or `http_fuzz_answers.py`.

By h11's reading of all bytes: another parser than those of the router. Pure.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import h11

from tests.kits.http_fuzz_answers import Answer
from tests.kits.http_fuzz_requests import HEAD_BYTES, STRAY, Case

OWN_5XX = (501, 505)  # that a bad request may get


class Message(NamedTuple):
    """A request or an answer as h11 reads it; `what`: its method or status."""

    what: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass
class Read:
    """What h11 finds in some bytes. `end`: "whole", "short" (more is to come) or "broken"."""

    messages: list[Message] = field(default_factory=list)
    end: str = "whole"
    why: str = ""
    rest: bytes = b""
    closes: bool = False  # nothing may follow the last message


def read_requests(data: bytes) -> Read:
    """All requests on one connection. Empty lines before a request are passed over (RFC 9112 2.2),
    and HTTP/1.0 keeps the connection where it asks for it: h11 is stricter in both."""
    found = Read(rest=data.lstrip(b"\r\n"))
    while found.rest and not found.closes:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        connection.receive_data(found.rest)
        try:
            request, body = connection.next_event(), b""
            if request is h11.NEED_DATA:
                found.end = "short"
                break
            while isinstance(event := connection.next_event(), h11.Data):
                body += event.data
        except h11.RemoteProtocolError as error:
            found.end, found.why = "broken", str(error)
            break
        if event is h11.NEED_DATA:
            found.end = "short"
            break
        assert isinstance(request, h11.Request)
        fields = request.headers.raw_items()
        what, target = request.method.decode(), request.target.decode("latin-1")
        found.messages.append(Message(what, target, fields, body))
        said = b",".join(v for n, v in fields if n.lower() in (b"connection", b"proxy-connection"))
        options = {option.strip() for option in said.lower().split(b",")}
        kept = request.http_version >= b"1.1" or b"keep-alive" in options
        found.closes = not kept or b"close" in options
        found.rest = connection.trailing_data[0].lstrip(b"\r\n")
    return found


def read_answers(data: bytes, methods: list[str], closed: bool = True) -> Read:
    """All answers on one connection to requests of `methods` (GET beyond them)."""
    found = Read(rest=data)
    while found.rest:
        index = len(found.messages)
        method = methods[index] if index < len(methods) else "GET"
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
        connection.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(found.rest)
        if closed:
            connection.receive_data(b"")
        head, body = None, b""
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                    found.end = "short"
                    return found
                if isinstance(event, h11.Response):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
        except h11.RemoteProtocolError as error:
            found.end, found.why = "broken", str(error)
            if "incomplete" in found.why or "without sending" in found.why:
                found.end = "short"
            return found
        assert head is not None
        found.rest = connection.trailing_data[0]
        found.closes = connection.their_state is h11.MUST_CLOSE
        fields = head.headers.raw_items()
        found.messages.append(Message(str(head.status_code), "", fields, body))
    return found


_SINGLE = (b"host", b"content-length", b"content-type", b"authorization", b"x-request-id")
_HOP = (
    b"connection", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"keep-alive", b"expect",
    b"proxy-connection", b"proxy-authorization", b"x-secret",
)  # fmt: skip


def judge_request(case: Case, data: bytes, seen: list[bytes]) -> list[str]:
    """What is wrong with the answers `data` (all, until the router closed or the case's time was
    up) and with what the engine was sent: the bytes of each request."""
    asked = read_requests(case.data)
    told = read_answers(data, [m.what for m in asked.messages])
    faults = []
    if told.end != "whole":
        faults.append(f"the answers are {told.end}: {told.why} {told.rest[:80]!r}")
    most = len(asked.messages) + (asked.end != "whole")
    if len(told.messages) > most:
        faults.append(f"{len(told.messages)} answers to {most} requests")
    statuses = [int(m.what) for m in told.messages]
    faults += [f"a {s} of ours" for s in statuses if s >= 500 and s not in OWN_5XX]
    refused = [s for s in statuses if s >= 400]
    fewer = len(statuses) < len(asked.messages) and not told.closes
    if fewer and not case.refused and not refused and asked.end == "whole":
        faults.append(f"{len(statuses)} answers to {len(asked.messages)} good requests")
    return faults + _judge_seen(case, asked, seen)


def _judge_seen(case: Case, asked: Read, seen: list[bytes]) -> list[str]:
    faults, left = [], [m for m in asked.messages if m.what == "POST"]
    for data in seen:
        if case.refused and b"-0." in data:
            faults.append(f"the engine saw what was to be refused: {data[:200]!r}")
        faults += [f"the engine was sent: {fault}" for fault in engine_faults(data)]
        body = data.partition(b"\r\n\r\n")[2]
        while left and not _same(left[0].body, body):
            left.pop(0)
        if not left:
            faults.append(f"the engine saw what nobody asked: {body[:200]!r}")
            break
        left.pop(0)
    return faults


def engine_faults(data: bytes) -> list[str]:
    """What is wrong with one request as an engine gets it."""
    read = read_requests(data)
    if read.end != "whole" or len(read.messages) != 1:
        return [f"{len(read.messages)} requests, {read.end} {read.why}"]
    head, message = data.partition(b"\r\n\r\n")[0], read.messages[0]
    names = [name.lower() for name, _ in message.headers]
    faults = [f"{names.count(name)} x {name!r}" for name in _SINGLE if names.count(name) > 1]
    faults += [f"no {name!r}" for name in (b"host", b"content-length") if name not in names]
    faults += [f"a header of the caller's hop, {name!r}" for name in _HOP if name in names]
    if (message.what, message.target.partition("?")[0]) != ("POST", "/v1/completions"):
        faults.append(f"{message.what} {message.target}")
    if re.search(rb"\x00|\r(?!\n)|(?<!\r)\n|\r\n[ \t]", head):
        faults.append(f"a head that others may read otherwise: {head[:200]!r}")
    if STRAY in data:
        faults.append("bytes that were not for it")
    return faults


def _same(asked: bytes, sent: bytes) -> bool:
    """Bodies mean the same: the router may rewrite the model."""
    if asked == sent:
        return True
    try:
        return bool(json.loads(asked) == json.loads(sent))
    except ValueError:
        return False


def judge_answer(answer: Answer, data: bytes) -> list[str]:
    """What is wrong with all that the caller got for `question`, until the router closed."""
    said = read_answers(answer.data, ["POST"], closed=answer.end != "keep")
    told = read_answers(data, ["POST", "GET"])
    faults = []
    if STRAY in data:
        faults.append(f"the caller got bytes that are no part of its answer: {data[:300]!r}")
    if told.end == "broken":
        faults.append(f"the caller cannot parse it: {told.why} {told.rest[:200]!r}")
    if len(told.messages) > 2:
        faults.append(f"{len(told.messages)} answers to 2 requests")
    if len(told.messages) == 2 and (told.messages[1].what, told.messages[1].body) != (
        "200",
        b"ok\n",
    ):
        faults.append(f"the second answer is {told.messages[1]}")
    if not told.messages:
        if not said.messages and told.end == "whole":
            faults.append("neither an answer nor a part of one")
        elif said.messages and said.end == "whole" and not said.rest:
            faults.append("a whole answer did not arrive")
        return faults
    first = told.messages[0]
    others = set(re.findall(rb"case-\d+\.", data)) - {b"case-%d." % answer.number}
    if others:
        faults.append(f"it has parts of others' answers: {others}")
    if int(first.what) >= 500 and not _is_error(first.body) and not _said(said, first):
        faults.append(f"a failure in no shape: {first}")
    if int(first.what) < 400 and said.end == "short" and not said.messages:
        faults.append(f"half an answer was passed on as a whole one: {first}")
    if (
        said.messages
        and said.end == "whole"
        and not _said(said, first)
        and not _is_error(first.body)
    ):
        faults.append(f"the answer was changed: {said.messages[0]} became {first}")
    if answer.name.startswith("good") and not _said(said, first):
        faults.append(f"a good answer became {first}")
    return faults


def _said(said: Read, told: Message) -> bool:
    """The first answer that the engine gave is what the caller got."""
    return bool(said.messages) and said.messages[0][::3] == told[::3]


def _is_error(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
        return isinstance(error["message"], str) and bool(error["message"])
    except (ValueError, KeyError, TypeError):
        return False
