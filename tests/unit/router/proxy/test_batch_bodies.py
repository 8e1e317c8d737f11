"""What may share a request, how it is put together, and that nobody gets another's part."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.proxy.batch_bodies import merged, part_of, shares, split
from runtime.wire.model_spec import Batching

EMBED, COMPLETE = "/v1/embeddings", "/v1/completions"
BOTH = Batching(endpoints=("embeddings", "completions"))


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


@pytest.mark.parametrize(
    ("path", "fields", "may"),
    [
        (EMBED, {"input": "a"}, True),
        (EMBED, {"input": [1, 2, 3]}, True),
        (EMBED, {"input": ["a", "b"]}, False),
        (EMBED, {"input": [[1], [2]]}, False),
        (EMBED, {"input": []}, False),
        (EMBED, {}, False),
        (COMPLETE, {"prompt": "a", "max_tokens": 5}, True),
        (COMPLETE, {"prompt": "a", "n": 1}, True),
        (COMPLETE, {"prompt": "a", "n": 2}, False),
        (COMPLETE, {"prompt": "a", "best_of": 2}, False),
        ("/v1/chat/completions", {"messages": []}, False),
    ],
)
def test_which_calls_may_share(path: str, fields: dict[str, Any], may: bool) -> None:
    assert (part_of(BOTH, path, body(**fields)) is not None) is may


def test_completions_only_where_the_spec_says_so() -> None:
    assert part_of(Batching(), COMPLETE, body(prompt="a")) is None


def test_calls_that_differ_in_anything_else_do_not_share() -> None:
    parts = [
        part_of(BOTH, EMBED, body(input="a")),
        part_of(BOTH, EMBED, body(input="b")),
        part_of(BOTH, EMBED, body(input="b", dimensions=8)),
        part_of(BOTH, EMBED, body(input="b", user="u")),
        part_of(BOTH, COMPLETE, body(prompt="b")),
    ]
    assert parts[0].alike == parts[1].alike
    assert len({part.alike for part in parts}) == 4


def test_no_name_of_a_field_passes_for_another_callers_fields() -> None:
    """Found in review: joined by NUL, which a JSON name may hold, these two were alike."""
    odd = b'{"model":"m","prompt":"x","temperature\\u00000\\u0000top_p":1}'
    plain = b'{"model":"m","prompt":"y","temperature":0,"top_p":1}'
    assert part_of(BOTH, COMPLETE, odd).alike != part_of(BOTH, COMPLETE, plain).alike


def test_a_text_and_a_list_of_tokens_do_not_share() -> None:
    text, tokens = (part_of(BOTH, EMBED, body(input=value)) for value in ("a", [1, 2]))
    assert text.alike != tokens.alike


@pytest.mark.parametrize("fields", [{"prompt_embeds": "x"}, {"encoding_format": "bytes"}])
def test_what_no_answer_could_be_taken_apart_of_goes_alone(fields: dict[str, Any]) -> None:
    assert part_of(BOTH, EMBED, body(input="a", **fields)) is None


several = st.one_of(
    st.lists(st.text(max_size=20), min_size=2, max_size=8),
    st.lists(st.lists(st.integers(0, 9999), min_size=1, max_size=5), min_size=2, max_size=8),
)


@given(several, st.booleans(), st.randoms())
def test_each_gets_its_own_part_whatever_the_texts(
    inputs: list[Any], embeds: bool, random: Any
) -> None:
    path, field = (EMBED, "input") if embeds else (COMPLETE, "prompt")
    parts = [part_of(BOTH, path, body(**{field: text})) for text in inputs]
    together = json.loads(merged(parts))
    assert together == {"model": "m", field: inputs}
    items = [
        {"index": i, "embedding": [i, 0.1]} if embeds else {"index": i, "text": f"answer {text}"}
        for i, text in enumerate(together[field])
    ]
    random.shuffle(items)
    name = "data" if embeds else "choices"
    usage = {"prompt_tokens": 101, "total_tokens": 101 if embeds else 178}
    if not embeds:
        usage["completion_tokens"] = 77
    whole = {"id": "x", "object": "list", name: items, "usage": usage}
    answers = [json.loads(answer) for answer in split(path, json.dumps(whole).encode(), parts)]
    for i, (text, answer) in enumerate(zip(inputs, answers, strict=True)):
        (item,) = answer[name]
        own = {"embedding": [i, 0.1]} if embeds else {"text": f"answer {text}"}
        assert item == {"index": 0, **own}
        assert (answer["id"], answer["object"]) == ("x", "list")
    for count in usage:
        assert sum(answer["usage"][count] for answer in answers) == usage[count]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b'{"data":[]}',
        b'{"data":[{"index":0},{"index":0}]}',
        b'{"data":[{"index":0},{"index":2}]}',
        b'{"data":[{"index":0},{"index":1},{"index":2}]}',
        b'{"data":[{"index":"a"},{"index":1}]}',
        b'{"data":[{"index":0},{"index":1}],"usage":7}',
    ],
)
def test_an_answer_that_has_not_one_part_for_each_is_used_for_nobody(answer: bytes) -> None:
    parts = [part_of(BOTH, EMBED, body(input=text)) for text in "ab"]
    assert split(EMBED, answer, parts) is None


def test_a_vector_keeps_every_digit() -> None:
    parts = [part_of(BOTH, EMBED, body(input=text)) for text in "ab"]
    vector = b"[0.10000000000000000001,-0.0]"
    answer = b'{"data":[{"index":0,"embedding":%b},{"index":1,"embedding":[]}]}' % vector
    first, _ = split(EMBED, answer, parts)
    assert vector in first


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**4), min_size=1, max_size=20))
def test_shares_add_up_and_are_fair(total: int, sizes: list[int]) -> None:
    got = shares(total, sizes)
    assert sum(got) == total
    weight = sum(sizes)
    if weight:
        assert all(abs(g - total * s / weight) < 1 for g, s in zip(got, sizes, strict=True))


def test_the_example_of_the_docstring() -> None:
    assert shares(10, [30, 70]) == [3, 7]
