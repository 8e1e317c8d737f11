"""Each word of the glossary has one meaning, and is one of the code's."""

from __future__ import annotations

import re

import pytest

from tests.unit.docs.pages import text
from tests.unit.rules.product import sources
from tests.unit.rules.product import text as source

ROWS = re.findall(
    r"^\| ([a-z][^|]*?) \| ([^|]+) \| ([^|]+) \|$", text("docs/glossary.md"), re.MULTILINE
)
WORDS = [word for word, _, _ in ROWS if word != "word"]


@pytest.fixture(scope="module")
def code() -> str:
    return "\n".join(map(source, sources())).lower()


def test_each_word_stands_once() -> None:
    assert len(WORDS) > 80
    assert len(set(WORDS)) == len(WORDS)


def test_the_words_of_a_table_are_in_order() -> None:
    for section in text("docs/glossary.md").split("\n## ")[1:]:
        words = re.findall(r"^\| ([a-z][^|(]*?) (?:\(|\|)", section, re.MULTILINE)
        assert words[0] == "word"
        assert words[1:] == sorted(words[1:])


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_used_in_the_code(word: str, code: str) -> None:
    plain = word.partition(" (")[0]
    assert re.search(rf"\b{plain.replace(' ', '[ _-]?')}", code), f"no file says {plain!r}"


def test_each_word_says_where_the_thing_is() -> None:
    assert all("`" in where or "](" in where for word, _, where in ROWS if word != "word")
