"""Lines of a batch: cutting files into them, what is wrong with them, and their results."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.jobs import lines
from runtime.router.jobs.lines import BatchLine, Check, Problem, Splitter, read_line

CHAT = "/v1/chat/completions"


def text(custom_id: object = "a", **changes: object) -> bytes:
    body = {"model": "m", "messages": []}
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes
    return json.dumps({name: value for name, value in line.items() if value is not None}).encode()


def test_a_good_lines_body_is_passed_on_as_it_was_written() -> None:
    raw = b'{"method":"POST","body": {"x": 1.00, "model":"m" } ,"url":"/v1/embeddings",'
    raw += b'"custom_id":"\\u00e9"}'
    assert read_line(raw, "/v1/embeddings") == BatchLine("é", "m", b'{"x": 1.00, "model":"m" }')


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (text(None), "missing_required_parameter", "custom_id"),
        (text(7), "missing_required_parameter", "custom_id"),
        (text("x" * 513), "missing_required_parameter", "custom_id"),
        (text(method="GET"), "invalid_method", "method"),
        (text(url="/v1/completions"), "invalid_url", "url"),
        (text(url="/v1/audio/speech"), "invalid_url", "url"),
        (text(body=None), "missing_required_parameter", "body"),
        (text(body=[]), "invalid_request", "body"),
        (text(body={}), "invalid_request", "body.model"),
        (text(body={"model": 3}), "invalid_request", "body.model"),
        (text(body={"model": "m", "stream": True}), "invalid_request", "body.stream"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(raw: bytes, code: str, param: str | None) -> None:
    found = read_line(raw, CHAT)
    assert isinstance(found, Problem)
    assert (found.code, found.param) == (code, param)


def test_a_custom_id_that_comes_twice_names_both_lines() -> None:
    check = Check(CHAT, 1000)
    assert check.line(1, text("a"))
    assert check.line(2, text("b"))
    assert check.line(4, text("a")) is None
    (problem,) = check.problems
    assert (problem.code, problem.line, check.count) == ("duplicate_custom_id", 4, 2)
    assert "line 1" in problem.message


def test_a_file_without_lines_has_an_error_and_a_hopeless_one_is_given_up() -> None:
    empty = Check(CHAT, 1000)
    empty.end()
    assert [problem.code for problem in empty.problems] == ["empty_file"]
    hopeless = Check(CHAT, 1000)
    for number in range(lines.MAX_PROBLEMS):
        assert not hopeless.given_up
        hopeless.line(number, b"?")
    assert hopeless.given_up


def test_a_file_with_too_many_lines_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINES", 2)
    check = Check(CHAT, 1000)
    for number in (1, 2, 3):
        check.line(number, text(str(number)))
    assert [(p.code, p.line) for p in check.problems] == [("too_many_tasks", 3)]


LINE = st.binary(max_size=12).map(lambda data: data.replace(b"\n", b" "))


@given(st.lists(LINE, max_size=12), st.integers(1, 7), st.booleans())
def test_however_a_file_is_cut_up_its_lines_come_out(
    texts: list[bytes], size: int, ended: bool
) -> None:
    data = b"\n".join(texts) + b"\n" * ended
    splitter, most, found = Splitter(8), 8, []
    for start in range(0, len(data), size):
        found += splitter.feed(data[start : start + size])
    found += splitter.end()
    wanted: list[tuple[int, bytes | None]] = []
    start = 0
    for number, line in enumerate(texts, 1):
        if len(line) > most:
            wanted.append((number, None))
        elif line.strip():
            wanted.append((number, line))
            (at,) = (at for n, at, _ in found if n == number)
            assert data[at : at + len(line)] == line
        start += len(line) + 1
    kept = [(n, line) for n, _, line in found if line is not None or len(texts[n - 1].strip())]
    assert kept == [(n, line) for n, line in wanted if line is not None or texts[n - 1].strip()]


def test_a_result_is_one_line_with_the_engines_numbers() -> None:
    body = b'{\n  "a": 1.00,\n  "b": "\\u00e9"\n}'
    result = lines.answered("batch_7f", 3, "é", 200, body)
    assert b"\n" not in result
    assert b'"body":{"a":1.00,"b":"\\u00e9"}' in result
    read = json.loads(result)
    assert (read["id"], read["custom_id"], read["error"]) == ("batch_req_7f_3", "é", None)
    assert read["response"]["status_code"] == 200


@pytest.mark.parametrize("body", [b"", b"oops\n", b'{"a":1} x', b'"\xff"'])
def test_an_answer_that_is_no_json_is_kept_as_text(body: bytes) -> None:
    read = json.loads(lines.answered("batch_7f", 3, "a", 200, body))
    assert read["response"]["body"] == body.decode("utf-8", "replace")


def test_a_line_without_an_answer_says_why() -> None:
    read = json.loads(lines.unanswered("batch_7f", 3, "a", "model_not_found", "no 'x'"))
    assert read["response"] is None
    assert read["error"] == {"code": "model_not_found", "message": "no 'x'"}
