"""Errors get their protocol's shape in one place: the router has no second one, by its sources."""

from __future__ import annotations

import ast

import pytest

from tests.unit.rules.product import sources, text

PLACE = "runtime/router/call/error_shapes.py"
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


@pytest.mark.parametrize("path", sources("runtime/router", but=PLACE))
def test_no_second_place_makes_errors(path: str) -> None:
    allowed = EXCEPTIONS.get(path, 0)
    assert len(found := violations(text(path))) == allowed, found


# Texts that tell of errors without being one.
EXCEPTIONS = {
    "runtime/router/front/openapi.py": 2,  # the document's schemas of an error, one a protocol
}


def test_the_place_is_there() -> None:
    assert violations(text(PLACE))


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
