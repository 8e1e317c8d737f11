"""What every test of every folder keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


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


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
