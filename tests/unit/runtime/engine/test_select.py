"""Which engine."""

import pytest

from runtime.engine.select import get_engine


@pytest.mark.parametrize("name", ["vllm", "stub"])
def test_engines_are_found_by_name(name):
    assert get_engine(name).name == name


def test_an_unknown_engine_is_told():
    with pytest.raises(ValueError, match="no engine 'tgi'; choose vllm or stub"):
        get_engine("tgi")
