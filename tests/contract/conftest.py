"""One suite for every registry: `registry_factory()` gives independent clients of one store."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from runtime.registry.consul import ConsulRegistry
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import Registry
from tests.kits.consul_server import MISSING, consul_is_installed, consul_server


@pytest.fixture(scope="session")
def consul_url() -> Iterator[str]:
    if not consul_is_installed():
        pytest.skip(MISSING)
    with consul_server() as url:
        yield url


@pytest.fixture(params=["embedded", pytest.param("consul", marks=pytest.mark.consul)])
def make_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Registry]:
    if request.param == "embedded":
        return lambda: EmbeddedRegistry(tmp_path / "registry.db")
    url = request.getfixturevalue("consul_url")
    return lambda: ConsulRegistry(url)


@pytest.fixture
async def registry_factory(
    make_registry: Callable[[], Registry],
) -> AsyncIterator[Callable[[], Registry]]:
    made: list[Registry] = []

    def factory() -> Registry:
        made.append(make_registry())
        return made[-1]

    yield factory
    for registry in made:
        await registry.close()


@pytest.fixture
def registry(registry_factory: Callable[[], Registry]) -> Registry:
    return registry_factory()


@pytest.fixture
def other(registry_factory: Callable[[], Registry]) -> Registry:
    """A second client of the same store."""
    return registry_factory()


@pytest.fixture
def base() -> str:
    """A prefix of this test's own: the Consul server is shared by all."""
    return f"test-{uuid.uuid4().hex}"
