"""A registry that cannot be asked says so with a RegistryError that names it and the question."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from runtime.registry.consul import ConsulRegistry
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import Registry, RegistryError
from tests.kits.consul_server import free_ports
from tests.kits.registry_services import service

CALLS: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "register the-name-1": lambda r: r.register(service("the-name"), 10),
    "keep some-id alive": lambda r: r.keep_alive("some-id"),
    "deregister some-id": lambda r: r.deregister("some-id"),
    "list the services some-name": lambda r: r.services("some-name"),
    "list the services waited-for": lambda r: r.services("waited-for", 1, 30),
    "get some/key": lambda r: r.get("some/key"),
    "list some/prefix/": lambda r: r.list("some/prefix/"),
    "list waited/for/": lambda r: r.list("waited/for/", 1, 30),
    "put some/key": lambda r: r.put("some/key", b""),
    "delete some/key": lambda r: r.delete("some/key"),
    "delete checked/key": lambda r: r.delete("checked/key", 3),
    "lock some/key": lambda r: r.acquire("some/key", b"", 10),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("kind", ["embedded", "consul"])
async def test_every_call_says_whom_and_what(kind: str, what: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "registry.db")
    registry: Registry = EmbeddedRegistry(where)
    if kind == "consul":
        where = f"http://127.0.0.1:{free_ports(1)[0]}"
        registry = ConsulRegistry(where)
    with pytest.raises(RegistryError) as caught:
        await CALLS[what](registry)
    assert where in str(caught.value)
    assert f"cannot {what}: " in str(caught.value)
    assert "registry.file" in str(caught.value) or "registry.consul_url" in str(caught.value)
    await registry.close()
