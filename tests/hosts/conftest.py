"""Hosts to apply the playbook to; without nspawn every test here skips, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kits.hosts.base_root import CannotMake, missing, wheelhouse
from tests.kits.hosts.machines import Machines, machines
from tests.kits.hosts.playbook import make_wheel


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Where hosts are booted, with the bind mount that each needs."""
    if why := missing():
        pytest.skip(f"hosts with systemd: {why}")
    try:
        wheelhouse()
        with machines(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except CannotMake as error:
        pytest.skip(f"no hosts with systemd here: {error}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return make_wheel(tmp_path_factory.mktemp("wheel"))
