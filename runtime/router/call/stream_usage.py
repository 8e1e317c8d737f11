"""Has an engine say what a stream took, for a caller whose tokens are counted. Pure.

vLLM tells the usage of a streamed chat or completion only where it is asked to, in one more event
with no choices: many clients fail on that event, so whoever did not ask for it does not get it.
Anthropic's streams and those of the Responses API tell it unasked.

Rules this file keeps:
- what the caller asked for itself is neither asked again nor taken out;
- the same bytes give the same result however they were cut into pieces, and events without usage
  pass as they came;
- an event is kept back until it is whole, unless it is larger than any with usage alone;
- a stream with other line ends than vLLM's is not waited for: all of it passes as it comes.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.call.body import Head

HELD_BYTES = 8 * 1024  # of an event that is not whole yet; one with usage alone has some hundred

_PATHS = {"/v1/chat/completions", "/v1/completions", "/inference/v1/generate", "/invocations"}
_OPTIONS, _INCLUDE, _CONTINUOUS = "stream_options", "include_usage", "continuous_usage_stats"
_ASKED = b'"stream_options":{"include_usage":true},'
_TRUE = msgspec.Raw(b"true")
# What pydantic takes for "no", in lower case and without quotes.
_NO = {b"null", b"false", b"0", b"0.0", b"f", b"n", b"no", b"off"}
END, USAGE = b"\n\n", b'"usage"'
_DATA = b"data: "

_read_object: Callable[[bytes], dict[str, msgspec.Raw]] = outside.reader(dict[str, msgspec.Raw])


def asking(path: str, body: bytes, head: Head) -> bytes | None:
    """`body` with the wish for usage in it, for the engine's `path`; None: it needs none.

    Example: `{"model":"m","stream":true}` gets `"stream_options":{"include_usage":true}`.
    """
    if not head.stream or path.partition("?")[0] not in _PATHS:
        return None
    said = bytes(head.stream_options)
    if not said:
        at = body.index(b"{") + 1
        return b"".join((body[:at], _ASKED, body[at:]))
    try:
        options = {} if said == b"null" else _read_object(said)
        if bytes(options.get(_INCLUDE, msgspec.Raw(b"null"))).lower().strip(b'"') not in _NO:
            return None
        options[_INCLUDE] = _TRUE
        options.pop(_CONTINUOUS, None)  # without the other it had no effect
        fields = outside.fields(body)
    except OutsideError:
        return None  # the engine refuses it
    fields[_OPTIONS] = msgspec.Raw(msgspec.json.encode(options))
    return msgspec.json.encode(fields)


class Strip:
    """Takes the usage out of a stream of events that nobody but us asked it for."""

    __slots__ = ("_as_is", "_held", "_last", "_long", "within")

    def __init__(self) -> None:
        self.within = False  # an event that is not whole: what comes next has to be fed
        self._held = b""  # the beginning of an event
        self._long = False  # within an event that passes as it comes
        self._last = b""  # byte that passed of it
        self._as_is = False  # all that comes

    def feed(self, data: bytes) -> bytes:
        """What is to be passed on, now that this piece has come. One of whole events without USAGE
        need not be fed."""
        passed = self._feed(data)
        self.within = self._long or bool(self._held)
        return passed

    def _feed(self, data: bytes) -> bytes:
        if self._as_is or b"\r" in data:  # JSON escapes it within a text
            self._as_is = True
            return self.rest() + data
        if not self._long:
            return self._events(data)
        window = self._last + data
        end = window.find(END)
        if end < 0:
            self._last = window[-1:]
            return data
        self._long = False
        cut = end + len(END) - len(self._last)
        return data[:cut] + self._events(data[cut:])

    def rest(self) -> bytes:
        """What was kept back, now that no more will come."""
        held, self._held = self._held, b""
        return held

    def told(self, sent: bytes) -> bytes:
        """`sent`, the end of what the engine sent, without what was kept back of it."""
        return sent[: len(sent) - len(self._held)]

    def _events(self, data: bytes) -> bytes:
        """Take `data`, which begins at an event's start, or after what is held of one."""
        if self._held:
            data = self._held + data
        cut = data.rfind(END) + len(END)
        if cut < len(END):
            cut = 0
        whole, self._held = data[:cut], data[cut:]
        whole = _cleaned(whole)
        if len(self._held) <= HELD_BYTES:
            return whole
        self._long, self._last = True, self._held[-1:]
        return whole + self.rest()


def _cleaned(events: bytes) -> bytes:
    """`events`, whole ones, without usage. From the right: it is told in the last of a stream."""
    kept = []
    stop = len(events)
    while (at := events.rfind(USAGE, 0, stop)) >= 0:
        before = events.rfind(END, 0, at)
        begin = before + len(END) if before >= 0 else 0
        end = events.index(END, at) + len(END)
        kept += [part for part in (events[end:stop], _without_usage(events[begin:end])) if part]
        stop = begin
    return b"".join((events[:stop], *reversed(kept))) if kept else events[:stop]


def _without_usage(event: bytes) -> bytes:
    """b"": there was nothing else in it. Text cannot pass for usage: its quotes are escaped."""
    if USAGE not in event or not event.startswith(_DATA):
        return event
    try:
        fields = _read_object(event[len(_DATA) :])
    except OutsideError:
        return event
    usage, choices = fields.pop("usage", None), fields.get("choices")
    if usage is None or bytes(usage) == b"null":
        return event
    if choices is not None and bytes(choices) == b"[]":
        return b""
    return _DATA + msgspec.json.encode(fields) + END
