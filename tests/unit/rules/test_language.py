"""Code, errors and documents are in plain engineer's English, without a dialect of our own.

docs/glossary.md has the words with a meaning of their own here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.kits.checkout import ROOT
from tests.unit.rules.product import PARTS, sources, text

OWN = "tests/unit/rules/test_language.py"  # it has to name them
# the dialect -> what to write
DIALECT = {
    r"of the mind": "simulated",
    r"befalls?|befell|befallen": "happens to, is injected",
    r"mend(s|ed|ing)?": "fix, repair, patch",
    r"thereby": "so, by this",
    r"_?akin": "by affinity, similar",
    r"shun(s|ned)?": "excluded, avoided",
    r"heirs?": "successor",
    r"stuffed": "full",
    r"that (is|are) none": "invalid, not a ...",
    r"for ever": "forever, until cancelled, without end",
    r"anew": "again",
    r"['’]s hands|the hands|hands of": "what carries the decisions out",
}
_WORDS = "|".join(f"(?P<w{i}>{word})" for i, word in enumerate(DIALECT))
_DIALECT = re.compile(rf"\b(?:{_WORDS})\b", re.I)  # one \b for all: a quarter of the time
_NO = re.compile(r"(?<!there )\b(is|are) no (?!longer\b|more\b)[a-z]")
_DOCUMENTS = ("*.md", "docs/*.md", "ansible/**/*.yml", "ansible/**/*.j2", "ansible/**/*.md")
_HISTORY = {"CHANGELOG.md"}


def dialect(content: str) -> list[str]:
    """Each line with a word of the dialect, and what to write."""
    plain = content.replace("_", " ")
    return [
        f"line {plain.count(chr(10), 0, hit.start()) + 1}: {hit[0]!r}: write {_instead(hit)}"
        for hit in _DIALECT.finditer(plain)
    ]


def _instead(hit: re.Match[str]) -> str:
    group = next(name for name, word in hit.groupdict().items() if word)
    return list(DIALECT.values())[int(group[1:])]


def errors_with_no(source: str) -> list[str]:
    """Each one-line string of a module that says "is no ..." for "is not a ..."; no docstrings."""
    return [words for words in _strings(source) if "\n" not in words and _NO.search(words)]


def _strings(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str):
            yield node.value


def documents() -> list[str]:
    """The paths of what people read, but for the history."""
    files = {path for pattern in _DOCUMENTS for path in ROOT.glob(pattern)}
    return sorted({path.relative_to(ROOT).as_posix() for path in files} - _HISTORY)


@pytest.mark.parametrize("folder", [*PARTS, "bench", "scripts", "tests"])
def test_there_is_no_dialect_in_code(folder: str) -> None:
    paths = sources(folder, but=OWN)
    assert [f"{path} {fault}" for path in paths for fault in dialect(text(path))] == []


def test_there_is_no_dialect_in_documents() -> None:
    assert [f"{path} {fault}" for path in documents() for fault in dialect(text(path))] == []


@pytest.mark.parametrize("part", PARTS)
def test_errors_say_is_not_a(part: str) -> None:
    assert [
        f"{path}: {words}" for path in sources(part) for words in errors_with_no(text(path))
    ] == []


@pytest.mark.parametrize(
    "planted",
    [
        "# a node of the mind",
        "what may befall a cluster",
        "the next heartbeat mends it",
        "def test_an_heir_goes_on():",
        '"""For ever: look."""',
        "replica = self._akin(route)",
        "a URL that is none",
        "reads them anew",
        "the core's hands",
        "Shunned for a while",
    ],
)
def test_a_planted_word_is_found(planted: str) -> None:
    assert dialect("plain\n" + planted)[0].startswith("line 2: ")


@pytest.mark.parametrize(
    "plain", ["their", "recommended", "amendment", "forever", "hands it over", "renewed", "sheir"]
)
def test_plain_words_are_allowed(plain: str) -> None:
    assert dialect(plain) == []


def test_a_planted_is_no_is_found() -> None:
    assert errors_with_no("raise ValueError(f'{port!r} is no port; use 1 to 65535')")
    assert errors_with_no("message = 'is no path'")


@pytest.mark.parametrize(
    "plain",
    [
        "'there is no model'",
        "'it is no longer asked'",
        "'is not a path'",
        "def f():\n    'This is no error.'",
    ],
)
def test_other_strings_are_allowed(plain: str) -> None:
    assert errors_with_no(plain) == []
