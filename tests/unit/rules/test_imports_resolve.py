"""What is imported of ours is there, also by benchmarks and tests that are seldom run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.kits.checkout import ROOT
from tests.unit.rules.product import PARTS, sources, text


@cache
def bound(path: str) -> frozenset[str]:
    """The names that a module has: defined, assigned or imported outside of its functions."""
    return frozenset(_bound(ast.parse(text(path)).body))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name.asname or name.name).split(".")[0] for name in node.names)
        else:
            for inside in ast.walk(node):
                if isinstance(inside, ast.Name) and isinstance(inside.ctx, ast.Store):
                    yield inside.id
        for block in ("body", "orelse", "finalbody"):
            yield from _bound(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _bound(handler.body)


def missing(source: str) -> list[str]:
    """What it imports of ours that is not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                name.name for name in node.names if _is_ours(name.name) and not _file(name.name)
            ]
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            path = _file(node.module or "")
            names = {name.name for name in node.names}
            lost = (
                {n for n in names if not _file(f"{node.module}.{n}")} - bound(path)
                if path
                else names
            )
            found += [f"{node.module}.{name}" for name in sorted(lost)]
    return found


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in PARTS


def _file(module: str) -> str:
    """A module's file; "": there is none."""
    base = module.replace(".", "/")
    return next((f for f in (f"{base}.py", f"{base}/__init__.py") if (ROOT / f).is_file()), "")


@pytest.mark.parametrize("path", sources(*PARTS, "bench", "tests", "scripts"))
def test_imports_resolve(path: str) -> None:
    assert missing(text(path)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import agent.nowhere",
        "from agent import nowhere",
        "def f():\n    from agent.node import Nobody",
        "from runtime.nowhere import anything",
    ],
)
def test_a_planted_import_is_found(planted: str) -> None:
    assert missing(planted)


def test_what_is_there_is_not_reported() -> None:
    assert (
        missing("import agent.link\nfrom agent.link import Leader, log\nfrom agent import core")
        == []
    )
