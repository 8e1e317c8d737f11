"""A stream's usage: asked for where nobody asked, and taken out again."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.call.body import read_head
from runtime.router.call.stream_usage import HELD_BYTES, Strip, asking
from runtime.router.call.token_meter import Meter

CHAT = "/v1/chat/completions"
WORD = b'data: {"choices":[{"delta":{"content":"\\"usage\\": 1"}}]}\n\n'
COUNTED = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":7}}\n\n'
UNCOUNTED = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
NULL = b'data: {"choices":[{"text":"x"}],"usage":null}\n\n'
LAST = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":12}}\n\n'
OTHER = b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
LONG = b'data: {"choices":[{"text":"%b"}]}\n\n' % (b"x" * (HELD_BYTES + 100))
DONE = b"data: [DONE]\n\n"


def sent(body: bytes, path: str = CHAT) -> bytes | None:
    return asking(path, body, read_head(body))


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("", {"include_usage": True}),
        ('"stream_options":null,', {"include_usage": True}),
        ('"stream_options":{},', {"include_usage": True}),
        ('"stream_options":{"include_usage":false},', {"include_usage": True}),
        ('"stream_options":{"include_usage":"No"},', {"include_usage": True}),
        ('"stream_options":{"include_usage":0},', {"include_usage": True}),
        ('"stream\\u005foptions":{"include_usage":null},', {"include_usage": True}),
        ('"stream_options":{"continuous_usage_stats":true},', {"include_usage": True}),
        ('"stream_options":{"include_obfuscation":false},',
         {"include_obfuscation": False, "include_usage": True}),
        ('"stream_options":{"include_usage":true},', None),
        ('"stream_options":{"include_usage":true,"continuous_usage_stats":true},', None),
        ('"stream_options":{"include_usage":1},', None),
        ('"stream_options":[],', None),
        ('"stream_options":7,', None),
    ],
)  # fmt: skip
def test_usage_is_asked_for_where_the_caller_did_not(said: str, options: object) -> None:
    body = f'{{{said}"temperature":0.10,"stream":true,"model":"m"}}'.encode()
    asked = sent(body)
    if options is None:
        assert asked is None
        return
    assert asked is not None
    assert b'"temperature":0.10,' in asked
    assert json.loads(asked) == {**json.loads(body), "stream_options": options}


def test_only_streams_that_do_not_tell_it_by_themselves_are_asked() -> None:
    for path in ("/v1/completions", "/invocations", CHAT + "?x=1", "/inference/v1/generate"):
        assert sent(b'{"model":"m","stream":true}', path) is not None
    for path in ("/v1/messages", "/v1/responses", "/v1/embeddings"):
        assert sent(b'{"model":"m","stream":true}', path) is None
    for body in (b'{"model":"m"}', b'{"model":"m","stream":null}', b'{"model":"m","stream":false}'):
        assert sent(body) is None


def test_a_body_with_a_mark_before_it_or_an_odd_field_is_asked_too() -> None:
    assert sent(b'\xef\xbb\xbf {"model":"m","stream":true}') == (
        b'\xef\xbb\xbf {"stream_options":{"include_usage":true},"model":"m","stream":true}'
    )
    odd = b'{"model":"m","stream":true,"seed":"x","stream_options":{"include_usage":true}}'
    assert sent(odd) is None


def passed(pieces: list[bytes]) -> bytes:
    meter = Meter(Strip())
    return b"".join(meter.feed(piece) for piece in pieces) + meter.rest()


@pytest.mark.parametrize(
    ("stream", "given_on"),
    [
        ([WORD, WORD, LAST, DONE], [WORD, WORD, DONE]),
        ([COUNTED, LAST, DONE], [UNCOUNTED, DONE]),
        ([NULL, OTHER, DONE], [NULL, OTHER, DONE]),
        ([b": waiting\n\n", LONG, LAST, DONE], [b": waiting\n\n", LONG, DONE]),
        ([WORD, b"data: not json \"usage\"\n\n"], [WORD, b"data: not json \"usage\"\n\n"]),
        ([WORD, WORD[:20]], [WORD, WORD[:20]]),
        ([b'{"error":{"usage":1}}'], [b'{"error":{"usage":1}}']),
        ([b'{"choices":[],"usage":{"prompt_tokens":1}}\n\n'],
         [b'{"choices":[],"usage":{"prompt_tokens":1}}\n\n']),
    ],
    ids=["last", "each", "null", "long", "no json", "cut off", "error", "whole"],
)  # fmt: skip
def test_it_is_taken_out_however_the_bytes_are_cut(
    stream: list[bytes], given_on: list[bytes]
) -> None:
    whole, wanted = b"".join(stream), b"".join(given_on)
    assert passed([whole]) == wanted
    assert passed(stream) == wanted
    assert passed([whole[i : i + 1] for i in range(len(whole))]) == wanted

    @given(st.lists(st.integers(0, len(whole)), max_size=12))
    def cut(at: list[int]) -> None:
        ends = [0, *sorted(at), len(whole)]
        assert passed([whole[a:b] for a, b in pairwise(ends)]) == wanted

    cut()


def test_the_meter_reads_what_is_taken_out() -> None:
    meter = Meter(Strip())
    for piece in (WORD, WORD, LAST, DONE):
        meter.feed(piece)
    assert meter.usage(CHAT)[:3] == (7, 12, True)


def test_what_was_told_of_an_answer_that_breaks_off_ends_with_an_event() -> None:
    meter = Meter(Strip())
    assert meter.feed(WORD + WORD[:30]) == WORD
    assert meter.told() == WORD
    meter = Meter(Strip())
    assert meter.feed(WORD + LONG[:-10]) == WORD + LONG[:-10]
    assert not meter.told().endswith(b"\n\n")


@pytest.mark.parametrize("cut", range(1, len(WORD) + 2))
def test_events_with_other_line_ends_are_not_kept_back(cut: int) -> None:
    """An engine that is not vLLM: its callers would wait for 8 KiB of words."""
    odd = WORD.replace(b"\n", b"\r\n")
    strip = Strip()
    assert strip.feed(odd[:cut]) + strip.feed(odd[cut:]) == odd
    assert strip.feed(b"data: x") == b"data: x"
