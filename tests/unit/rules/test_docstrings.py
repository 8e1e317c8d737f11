"""Each public definition says what it does or is, in words that need no antecedent."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.unit.rules.product import PARTS, sources, text

# A docstring is read alone, e.g. in an editor's hint: there is nothing that "it" could stand for.
POINTERS = ("It", "Its", "They", "Their", "That", "Those", "This", "These", "Whom")


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def faults(source: str) -> list[str]:
    """What is wrong with the docstrings of a module, by the name of the definition."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, public in _public(tree.body):
        if not ast.get_docstring(public):
            found.append(f"{name} has no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            first = (ast.get_docstring(node) or "").replace("'", " ").split(maxsplit=1)[:1]
            if first and first[0] in POINTERS:
                name = getattr(node, "name", "the module")
                found.append(f"{name}: begins with {first[0]!r}; begin with a verb or a noun")
    return found


def _public(body: list[ast.stmt], of: str = "") -> Iterator[tuple[str, Documented]]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _public(node.body, of)
        if not isinstance(node, Documented):
            continue
        if not node.name.startswith("_"):
            yield of + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{of}{node.name}.")


@pytest.mark.parametrize("part", PARTS)
def test_public_definitions_say_what_they_are(part: str) -> None:
    assert [f"{path}: {fault}" for path in sources(part) for fault in faults(text(path))] == []


GOOD = '"""A module."""\nclass A:\n    """A class."""\n    def f(self):\n        """Do this."""\n'


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("x = 1\n", "the module"),
        (GOOD + "def g():\n    pass\n", "g "),
        (GOOD + "class B:\n    x = 1\n", "B "),
        (GOOD + "    async def g(self):\n        pass\n", "A.g "),
        (GOOD + "    @property\n    def g(self):\n        return 1\n", "A.g "),
        (GOOD + 'def _g():\n    """It is over."""\n', "_g: "),
        (GOOD + 'def g():\n    """Those that wait."""\n', "g: "),
        (GOOD + 'def g():\n    """It\'s over."""\n', "g: "),
    ],
)
def test_a_planted_fault_is_found(planted: str, name: str) -> None:
    (fault,) = faults(planted)
    assert fault.startswith(name)


@pytest.mark.parametrize(
    "plain",
    ["", "def _g():\n    pass\n", "    def _g(self):\n        pass\n", "class _B:\n    x = 1\n"],
)
def test_what_is_private_need_not(plain: str) -> None:
    assert faults(GOOD + plain) == []
