"""Bytes from outside: whatever is wrong with them is one expected error, in words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw, Struct

from runtime import outside
from runtime.outside import NAME_BYTES, OutsideError
from runtime.router.call.body import Head, invocation, read_head, with_model
from runtime.router.call.errors import CallError
from runtime.router.jobs.lines import Problem, read_line
from runtime.router.proxy.batch_bodies import part_of
from runtime.wire.agent_messages import Heartbeat
from runtime.wire.model_spec import Batching

DEEP = [1_000, 100_000, 500_000]


class Small(Struct):
    a: int = 0


def nested(levels: int, field: str = "x") -> bytes:
    return b'{"model":"m","%b":' % field.encode() + b"[" * levels + b"]" * levels + b"}"


def refused(call: object, *args: object) -> str:
    with pytest.raises((OutsideError, CallError)) as caught:
        call(*args)  # type: ignore[operator]
    return str(caught.value)


@pytest.mark.parametrize("levels", DEEP)
@pytest.mark.parametrize("field", ["x", "model", "stream", "user", "messages"])
def test_a_body_that_is_nested_too_deep_is_refused_with_the_limit(levels: int, field: str) -> None:
    body = nested(levels, field)
    for read in (
        lambda: read_head(body),
        lambda: with_model(body, "m"),
        lambda: invocation(body.replace(b"model", b"prompt"), "m", None),
        lambda: outside.json_document(body),
        lambda: outside.decode(body, Heartbeat),
        lambda: outside.model_json(body),
        lambda: outside.one_line(body),
        lambda: outside.fields(body),
    ):
        assert "is nested too deep: at most " in refused(read)


@pytest.mark.parametrize("levels", DEEP)
def test_a_batch_line_that_is_nested_too_deep_is_a_problem(levels: int) -> None:
    text = b'{"custom_id":"1","method":"POST","url":"/v1/completions","body":%b}' % nested(levels)
    found = read_line(text, "/v1/completions")
    assert isinstance(found, Problem)
    assert "is nested too deep" in found.message


def test_what_another_decoder_let_pass_does_not_fail_where_calls_are_merged() -> None:
    assert part_of(Batching(endpoints=("embeddings",)), "/v1/embeddings", nested(2_000)) is None


@pytest.mark.parametrize("levels", [65, 600, 2_000])
def test_a_document_is_held_to_its_own_depth(levels: int) -> None:
    text = "[" * levels + "]" * levels
    assert "at most 64" in refused(outside.json_document, text.encode())
    assert "at most 64" in refused(outside.document, text)
    assert outside.json_document(b"[" * 60 + b"]" * 60)


def test_a_bom_is_read_as_vllm_reads_it() -> None:
    body = b'\xef\xbb\xbf{"model":"m","a":1}'
    assert json.loads(body) == {"model": "m", "a": 1}  # what vLLM reads bodies with
    assert read_head(body).model == "m"
    assert read_head(with_model(body, "n")[0]).model == "n"
    assert outside.decode(body, Small) == Small(1)
    assert outside.json_document(body)["a"] == 1
    assert set(outside.fields(body)) == {"model", "a"}
    assert "JSON" in refused(read_head, b"\xef\xbb\xbf" * 3)


@pytest.mark.parametrize("user", [r"\ud800", r"a\udfff", r"\ud800\ud800", r"\ud83dx", r"\uDBFF"])
@pytest.mark.parametrize("field", ["user", "model"])
def test_half_of_a_surrogate_pair_is_called_that(user: str, field: str) -> None:
    body = b'{"model":"m","%b":"%b"}' % (field.encode(), user.encode())
    assert "half of a surrogate pair" in refused(read_head, body)
    assert read_head(b'{"model":"m","user":"\\ud83d\\ude00"}').user == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    "body",
    [b'{"model":"\xff"}', '{"model":"m"}'.encode("utf-16"), '{"model":"m"}'.encode("utf-32")],
)
def test_another_encoding_is_called_that(body: bytes) -> None:
    assert "is not in UTF-8" in refused(read_head, body)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b'{"a":1}x', b'{"model":"m"'])
def test_what_is_no_object_is_called_that(body: bytes) -> None:
    assert "the body is not a JSON object" in refused(read_head, body)


@pytest.mark.parametrize("name", ["a" * 257, "é" * 129, "€" * 86, "a" * 31 * 2**20])
def test_a_longer_name_than_there_is_gets_no_further(name: str) -> None:
    said = refused(read_head, json.dumps({"model": name}, ensure_ascii=False).encode())
    assert f"model may have at most {NAME_BYTES} bytes, got {len(name.encode())}" in said
    assert len(said) < 200


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "€" * 85])
def test_a_name_of_just_that_length_is_looked_for(name: str) -> None:
    assert read_head(json.dumps({"model": name}).encode()).model == name


def test_more_keys_than_are_read_one_by_one_are_refused() -> None:
    many = b",".join(b'"k%d":1' % i for i in range(outside.KEYS + 1))
    body = b'{"model":"m","prompt":"x",%b}' % many
    assert "has more than 4096 keys" in refused(outside.fields, body)
    assert "has more than 4096 keys" in refused(with_model, body, "n")
    assert "has more than 4096 keys" in refused(invocation, body, "n", None)
    assert read_head(body).model == "m"  # which only skips them


def test_a_long_conversation_is_not_taken_for_many_keys() -> None:
    messages = [{"role": "user", "content": "a: b: c:"}] * 5_000
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(3_000)]
    body = json.dumps({"model": "m", "messages": messages, "tools": tools}).encode()
    changed, head = with_model(body, "n")
    assert head.model == "n"
    assert json.loads(changed) == json.loads(body) | {"model": "n"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("user", [["x"]]), ("seed", 1.5), ("max_tokens", "9"), ("temperature", None), ("user", 7)],
)
def test_a_hint_of_another_type_is_none_and_is_left_to_the_engine(
    field: str, value: object
) -> None:
    body = json.dumps({"model": "m", "stream": True, "seed": 3} | {field: value}).encode()
    wanted = Head(model="m", stream=True, seed=3)
    setattr(wanted, field, None)
    assert read_head(body) == wanted


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model":7}', "model must be a model's name, got 7"),
        (b'{"model":null}', "the body has no model"),
        (b'{"model":"m","stream":"yes"}', 'stream must be true or false, got "yes"'),
        (b"{}", "the body has no model"),
        (b'{"model":""}', "the body has no model"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_value(body: bytes, words: str) -> None:
    assert words in refused(read_head, body)


def test_an_odd_value_is_shown_short() -> None:
    said = refused(read_head, b'{"model":[%b]}' % (b"[]," * 100_000 + b"1"))
    assert "got [[],[]," in said
    assert len(said) < 200


def test_a_document_has_bounds() -> None:
    assert "at most 1048576 bytes" in refused(outside.json_document, b'"' + b"a" * 2**20 + b'"')
    assert "more than 20000 values" in refused(outside.json_document, b"[%b1]" % (b"1," * 20_000))
    assert "a key that is too long" in refused(outside.json_document, b'{"%b":1}' % (b"a" * 300))
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n"
        for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "more than 20000 values" in refused(outside.document, laughs)


@pytest.mark.parametrize("text", ["a: 2020-99-99", "? [a]\n: 1", "a: [", "a: 1\na: 2", "\tx: 1"])
def test_yaml_that_cannot_be_read_is_an_error_in_words(text: str) -> None:
    assert "cannot be read" in refused(outside.document, text)


def test_a_models_file_may_hold_what_pythons_library_writes() -> None:
    assert outside.model_json(b'{"time_step_limit":[0.0,Infinity]}') == {
        "time_step_limit": [0.0, float("inf")]
    }
    assert "is not valid JSON" in refused(outside.model_json, b"{")
    assert "is not valid JSON" in refused(outside.model_json, b"1" * 5_000)


def test_an_error_names_the_field() -> None:
    with pytest.raises(OutsideError) as caught:
        outside.decode(b'{"a":"x"}', Small)
    assert caught.value.field == "a"
    assert str(caught.value).startswith("is not a Small: ")


def words_of(read: object, *args: object) -> str:
    """What is said of bytes that can't be read; "": they can."""
    try:
        read(*args)  # type: ignore[operator]
    except OutsideError as error:
        return str(error) or "nothing"
    return ""


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    said = {words_of(outside.decode, data, kind) for kind in (Small, dict[str, Raw], list, str)}
    for read in (outside.json_document, outside.model_json, outside.fields, outside.one_line):
        said.add(words_of(read, data))
    assert "nothing" not in said


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_any_text_is_a_document_or_refused(text: str) -> None:
    assert "nothing" not in {words_of(outside.document, text, s) for s in (".yaml", ".toml")}
