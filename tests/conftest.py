"""What every test of every folder keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def the_process_stays_as_it_was() -> Iterator[None]:
    """A test may not leave another umask or folder to the tests after it: one that did made every
    file of theirs private, and two of them failed an hour later."""
    umask, folder = _umask(), os.getcwd()
    yield
    after = (_umask(), os.getcwd())
    os.umask(umask)
    os.chdir(folder)
    assert after == (umask, folder), "this test leaves another umask or working folder behind"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names, for `--dist loadgroup`, the tests that one worker must run one after the other."""
    for item in items:
        if group := _what_it_shares(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _what_it_shares(item: pytest.Item) -> str | None:
    if item.path.is_relative_to(TESTS / "hosts"):
        return "hosts"  # each boots systemd and installs the wheel: one is enough for two cores
    if item.path.name == "test_ansible.py":
        return "ansible"  # all play on roots made from one
    if item.get_closest_marker("vllm"):
        return "vllm"  # gigabytes of memory each
    if isinstance(item, pytest.Function) and _has_fixture_of_its_module(item):
        return item.nodeid.partition("::")[0]  # the fixture would be made in every worker
    return None


def _has_fixture_of_its_module(item: pytest.Function) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs
    return any(fixtures[name][-1].scope == "module" for name in fixtures)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
