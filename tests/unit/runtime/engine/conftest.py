"""What the stub's tests share: one process for all tests of a file that leave it as it is."""

import pytest

from tests.kits.stub_engine import Engine


@pytest.fixture(scope="module")
def one_stub():
    one = Engine(start_s=0, ttft_s=0, token_s=0)
    yield one
    one.kill()


@pytest.fixture
async def engine(one_stub):
    """A stub that serves. A test that changes it starts its own: `running`."""
    yield await one_stub.ready()
    await one_stub.leave()
