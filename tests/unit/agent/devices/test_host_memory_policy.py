"""What host memory may be booked, and which settings can't be."""

from __future__ import annotations

import pytest

from agent.devices.host_memory_policy import (
    budget_bytes,
    check_budget,
    engines_bytes,
    level_1_refusal,
    reserve_bytes,
)
from runtime.contract import config
from runtime.sizes import GIB
from runtime.wire.agent_messages import DeviceReport


def device(kind, total):
    return DeviceReport(
        device_id="d", index=0, kind=kind, name="d", memory_total_bytes=total, memory_used_bytes=0
    )


@pytest.mark.parametrize(
    ("limit", "declared", "reserve"),
    [(512, None, 51.2), (16, None, 2), (3, None, 1.5), (64, 8, 8), (64, 0, 0)],
)
def test_the_reserve(limit, declared, reserve):
    declared_bytes = None if declared is None else declared * GIB
    assert reserve_bytes(limit * GIB, declared_bytes) == int(reserve * GIB)


def test_the_budget_is_what_the_limit_leaves():
    def budget(declared=None, **fields):
        values = {"reserve": 50, "launcher": 1, "engine": 12, **fields}
        values = {f"{name}_bytes": gib * GIB for name, gib in values.items()}
        return budget_bytes(limit_bytes=512 * GIB, declared_bytes=declared, **values) / GIB

    assert budget() == 449
    assert budget(declared=100 * GIB) == 100
    assert budget(declared=500 * GIB) == 449
    assert budget(engine=500) == 0


def test_a_cpu_device_is_host_memory_too():
    assert engines_bytes("cpu", (device("cpu", 20 * GIB),), 3 * GIB) == 20 * GIB
    assert engines_bytes("nvml", (device("nvml", 80 * GIB),), 3 * GIB) == 3 * GIB


def test_settings_that_this_host_cannot_have():
    with pytest.raises(ValueError, match=r"agent\.host_reserve_bytes = .* leaves nothing"):
        reserve_bytes(8 * GIB, 8 * GIB)
    with pytest.raises(ValueError, match=r"agent\.host_budget_bytes = .* is more than"):
        check_budget(8 * GIB, 9 * GIB)
    check_budget(8 * GIB, 8 * GIB)


def test_sizes_are_read_from_file_and_environment(tmp_path):
    file = tmp_path / "stoker.toml"
    file.write_text('[agent]\nhost_reserve_bytes = "8GiB"\n')
    found = config.load(file, {"STOKER_AGENT_HOST_BUDGET_BYTES": "200GiB"}).agent
    assert (found.host_budget_bytes, found.host_reserve_bytes) == (200 * GIB, 8 * GIB)


def test_level_1_is_refused_in_words_where_the_weights_do_not_fit():
    assert level_1_refusal(4 * GIB, 4 * GIB) is None
    assert "host_reserve_bytes" in (level_1_refusal(4 * GIB + 1, 4 * GIB) or "")
