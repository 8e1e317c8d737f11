"""Errors get their protocol's shape in one place: the router has no second one, by its sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLACE = "runtime/router/error_shapes.py"
# What error events, and the end of a stream, are made of.
_WORDS = ("[DONE]", "event: error", '"error":', "'error':")
# Of an object with these fields only, `error` is what a failed call is answered with.
_ERROR_FIELDS = {"error", "type", "request_id"}


def violations(source: str) -> list[str]:
    """Every place of a file of the router that makes an error's body or event, in words."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and makes_error(node):
            found.append(f"line {node.lineno}: makes an error's body")
        if isinstance(node, ast.Constant) and id(node) not in docs:
            text = node.value
            text = text.decode("latin-1") if isinstance(text, bytes) else text
            if isinstance(text, str) and any(word in text for word in _WORDS):
                found.append(f"line {node.lineno}: makes an error or the end of a stream: {text!r}")
    return found


def makes_error(node: ast.Dict) -> bool:
    """Whether it is `{"error": …}`, with or without what Anthropic has beside it."""
    keys = {key.value if isinstance(key, ast.Constant) else key for key in node.keys}
    return "error" in keys and keys <= _ERROR_FIELDS


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "runtime/router").rglob("*.py"))


@pytest.mark.parametrize("path", [path for path in sources() if path != PLACE])
def test_no_second_place_makes_errors(path: str) -> None:
    allowed = EXCEPTIONS.get(path, 0)
    assert len(found := violations((ROOT / path).read_text(encoding="utf-8"))) == allowed, found


# Texts that tell of errors without being one.
EXCEPTIONS = {
    "runtime/router/openapi.py": 2,  # the document's schemas of an error, one a protocol
}


def test_the_place_is_there() -> None:
    assert violations((ROOT / PLACE).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "planted",
    [
        'body = {"error": {"message": "m"}}',
        'body = {"type": "error", "error": inner, "request_id": id}',
        'await client.write(b"data: [DONE]\\n\\n")',
        'text = f"event: error\\ndata: {data}"',
        "raw = b'{\"error\": {}}'",
    ],
)
def test_a_planted_second_place_is_found(planted: str) -> None:
    assert violations(planted)


def test_what_only_tells_of_errors_is_none() -> None:
    assert not violations('"""Ends with data: [DONE]."""\nrow = {"custom_id": 1, "error": None}')
