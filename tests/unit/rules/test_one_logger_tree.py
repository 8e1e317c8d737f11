"""Every logger of the product is `stoker` or below it, such as `stoker.router`."""

from __future__ import annotations

import ast

import pytest

from tests.unit.rules.product import sources, text

OTHERS = {"aiohttp.access"}  # a library's own, which is set to say less


def other_loggers(source: str) -> list[str]:
    """The names that loggers are asked for by and that are not ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
            name = node.args[0] if node.args else None
            word = name.value if isinstance(name, ast.Constant) else ast.unparse(node)
            if not str(word).startswith("stoker.") and word not in {"stoker", *OTHERS}:
                found.append(str(word))
    return found


@pytest.mark.parametrize("path", sources())
def test_loggers_are_ours(path: str) -> None:
    assert other_loggers(text(path)) == []


@pytest.mark.parametrize("planted", ['"scheduler"', "__name__", "", '"stokers"'])
def test_a_planted_logger_is_found(planted: str) -> None:
    assert other_loggers(f"log = logging.getLogger({planted})")


def test_ours_are_allowed() -> None:
    assert other_loggers('log = logging.getLogger("stoker.agent")') == []
