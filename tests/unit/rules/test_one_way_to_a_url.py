"""A URL with a variable in its path is made by `runtime.places.url`, and nowhere else.

What is looked for: an f-string that begins like an address or a path and has a value in it, a value
with a name like an address's that a path follows, and `+` after such a name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.unit.rules.product import sources, text

HOME = "runtime/places.py"
ADDRESS = re.compile(r"(^|[._])(url|urls|base_url|address|peer|endpoint|router|admin|leader)$")
# file -> (the expressions that may stay, why)
ALLOWED: dict[str, tuple[set[str], str]] = {
    "agent/cache/hub.py": (
        {"urljoin(url, found.location)"},
        "where the hub redirects to; only the hub's own host is sent the token",
    ),
    "agent/engines/probe.py": (
        {"target.base_url + target.health_path", "target.base_url + path"},
        "literals of ours: /health and the control routes",
    ),
    "agent/engines/sleep.py": (
        {"self._base_url + path"},
        "literals of ours: an engine's control routes",
    ),
    "agent/sim/node.py": (
        {"f'http://{self.node_id}'"},
        "the simulator: names that nobody connects to",
    ),
    "agent/sim/reports.py": (
        {"f'http://{self._node_id}/{report.replica_id}'"},
        "the simulator: names that nobody connects to",
    ),
    "cli/router_client.py": ({"f'{url}{path}'"}, "one of the two paths of `ask_body`"),
    "cli/client.py": (
        {"f'{address}{path}'",
         "f'{self._url}{path} answered something else than the admin API does: {error}'"},
        "every path is a literal or made by `places.url`; the second is a message",
    ),
    "runtime/router/call/error_shapes.py": ({"'/v1/' + tail"}, "compared with our own paths"),
    "runtime/router/front/openapi.py": (
        {"f'/models/{{model}}/v1{tail}'", "'/v1' + tail", "f'/v1{tail}'"},
        "a document of our own paths: nothing is sent there",
    ),
    "runtime/router/front/api.py": (
        {"f\"/models/{{model:.+?}}{{path:{'|'.join(map(re.escape, V1_PATHS))}}}\""},
        "a pattern that requests are matched by: nothing is sent there",
    ),
}  # fmt: skip


def second_ways(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of everything that makes a URL by hand."""
    for node in ast.walk(ast.parse(source)):
        if _is_address(node) or _is_sum(node) or _is_join(node):
            assert isinstance(node, ast.expr)
            yield node.lineno, ast.unparse(node)


def _is_join(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("urljoin")


def _is_address(node: ast.AST) -> bool:
    if not isinstance(node, ast.JoinedStr):
        return False
    first, *rest = node.values
    text = str(rest[0].value) if rest and isinstance(rest[0], ast.Constant) else ""
    if isinstance(first, ast.Constant):
        begins = str(first.value)
        values = any(isinstance(part, ast.FormattedValue) for part in rest)
        return values and re.match(r"(?!/proc/)/[a-z]|https?://", begins) is not None
    assert isinstance(first, ast.FormattedValue)
    named = ADDRESS.search(ast.unparse(first.value).lower()) is not None
    if re.match(r"[/?][a-z]", text):
        return True
    return named and len(rest) > 0 and (text[:1] == "/" or isinstance(rest[0], ast.FormattedValue))


def _is_sum(node: ast.AST) -> bool:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return False
    left = node.left
    if isinstance(left, ast.Constant) and isinstance(left.value, str):
        constant = isinstance(node.right, ast.Constant)
        return not constant and re.match(r"(?!/proc/)/[a-z]|https?://", left.value) is not None
    return ADDRESS.search(ast.unparse(left).lower()) is not None


def test_there_is_one_way_to_a_url() -> None:
    found = []
    for path in sources(but=HOME):
        allowed = ALLOWED.get(path, (set(), ""))[0]
        for line, words in second_ways(text(path)):
            if words not in allowed:
                found.append(f"{path}:{line}: {words}: use runtime.places.url")
    assert found == []


def test_what_is_allowed_is_still_there() -> None:
    for path, (allowed, _) in ALLOWED.items():
        found = {words for _, words in second_ways(text(path))}
        assert allowed <= found, f"{path}: drop {allowed - found} from the list"


@pytest.mark.parametrize(
    "planted",
    [
        'url = f"{address}/agent/replicas/{replica_id}/logs"',
        'url = f"{self._driver.agent_address(node)}/agent/cache{path}"',
        'x = f"{leader.url}/internal/{name}"',
        'x = f"/admin/models/{name}"',
        'x = f"http://{host}:{port}/v1/{tail}"',
        'x = f"{base_url}{path}"',
        'x = f"{url}/{name}"',
        'x = f"{peer}?source={source}"',
        "x = base_url + path",
        'x = "/agent/cache/blobs/" + sha256',
        'x = self._url + "/x/" + name',
        "x = urljoin(base, name)",
    ],
)
def test_a_second_way_is_found(planted: str) -> None:
    assert list(second_ways(f"def f():\n    {planted}\n")), planted


@pytest.mark.parametrize(
    "plain",
    ['x = f"{m.ready}/{m.replicas}"', 'x = f"/proc/{pid}/stat"', 'x = f"{a} of {b}"',
     'x = places.url(base, "a", name)', 'x = "/v1/models"', "x = count + 1", 'x = f"{url} is no"'],
)  # fmt: skip
def test_what_is_no_url_is_let_be(plain: str) -> None:
    assert list(second_ways(plain)) == []
