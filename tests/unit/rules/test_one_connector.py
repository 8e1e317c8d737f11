"""Connections to other hosts notice that a host is gone: runtime/sockets.py makes every connector.

aiohttp's own sessions wait for a silent host as long as their time limit says, or forever.
"""

from __future__ import annotations

import ast

import pytest

from tests.unit.rules.product import sources, text

PLACE = "runtime/sockets.py"
# Of what needs no network, or has a limit of its own for each read.
ALLOWED = {
    "agent/cache/sources.py": ["HTTPConnection"],  # gives up on a peer after 20 s without a byte
}


def connectors(source: str) -> list[str]:
    """What makes connections in a way of its own, by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        given = {keyword.arg for keyword in node.keywords}
        bare = name == "ClientSession" and "connector" not in given
        own = name in ("TCPConnector", "HTTPConnection", "HTTPSConnection", "urlopen")
        if bare or own or called == "aiohttp.request":
            found.append(name)
    return found


@pytest.mark.parametrize("path", sources(but=PLACE))
def test_connections_are_made_in_one_place(path: str) -> None:
    assert connectors(text(path)) == ALLOWED.get(path, []), "use runtime.sockets.tcp_connector"


def test_the_place_is_there() -> None:
    assert connectors(text(PLACE)) == ["TCPConnector"]


@pytest.mark.parametrize(
    "planted",
    [
        "aiohttp.ClientSession()",
        "ClientSession(headers=headers)",
        "aiohttp.ClientSession(connector=aiohttp.TCPConnector())",
        "aiohttp.request('GET', url)",
        "http.client.HTTPSConnection(host)",
        "urllib.request.urlopen(url)",
    ],
)
def test_a_second_place_is_found(planted: str) -> None:
    assert connectors(planted)


@pytest.mark.parametrize(
    "plain",
    ["aiohttp.ClientSession(connector=tcp_connector())", "request(url)", "session.get(url)",
     "aiohttp.ClientSession(connector=aiohttp.UnixConnector(path))"],
)  # fmt: skip
def test_what_is_made_there_is_allowed(plain: str) -> None:
    assert connectors(plain) == []
