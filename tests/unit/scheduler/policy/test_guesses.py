"""What the scheduler takes a start to last, and a model to need, from little that was measured."""

from __future__ import annotations

import pytest

from runtime.contract.footprint_ledger import Footprint, Key, Times
from runtime.wire.agent_messages import MemoryEstimate
from runtime.wire.model_spec import ModelSpec
from scheduler.policy.eviction import cheapest_descents, rank, wait_s
from scheduler.policy.ladder import Descent, climb_s
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState, Model, Replica, Stage

GIB = 2**30


def model(weights: int, total: int, measured: int | None = None) -> Model:
    estimate = MemoryEstimate(
        weights_bytes=weights, kv_bytes=0, overhead_bytes=0, total_bytes=total, explanation=""
    )
    stored = m.StoredModel(spec=ModelSpec(name="a", source="hf:a/a"), estimate=estimate)
    effective = stored.effective()
    made = Model(stored, effective, effective.launch_key())
    key = Key("a", made.launch_key, "vllm", "1", "nvml")
    made.footprint = Footprint(key=key, device_bytes=measured)
    return made


def test_a_quick_pull_does_not_make_other_starts_free() -> None:
    """Seen in bench/policy.py: 16 GB pulled and started in 25 s, so a start "takes 0.1 s"."""
    a = model(16 * 10**9, 24 * GIB)
    assert a.footprint is not None
    a.footprint = a.footprint.with_times("start-remote", 25.0, {})
    staged, cached, remote = (climb_s(a, 0, rung) for rung in ("staged", "cached", "remote"))
    assert 5 < staged < cached < remote == 25.0
    assert climb_s(a, 1) <= 2.0


def test_a_model_that_fills_a_device_still_fits_once_it_was_measured() -> None:
    """Seen in bench/policy.py: 78 GiB served on 80, then "needs 82.2 GiB", refused forever."""
    full = 78 * GIB
    assert model(64 * 10**9, full, measured=full).booked_bytes() == full
    assert model(64 * 10**9, full, measured=full - GIB).booked_bytes() == full
    assert model(64 * 10**9, full, measured=10 * GIB).booked_bytes() == int(10.5 * GIB)
    assert model(64 * 10**9, 8 * GIB, measured=10 * GIB).booked_bytes() == int(10.5 * GIB)


def test_a_sleeper_sleeps_on_where_a_hot_model_frees_the_room_for_less() -> None:
    state = ClusterState()
    for name in ("hot", "asleep"):
        spec = ModelSpec(name=name, source="hf:a/a", device_memory_bytes=20 * GIB)
        state.models[name] = Model(m.StoredModel(spec=spec), spec, spec.launch_key())
    hot = Replica("h", "hot", "n", ("d",), 20 * GIB, "k", Stage.READY, 0.0, "", used_at=90.0)
    asleep = Replica("s", "asleep", "n", ("d",), 20 * GIB, "k", Stage.ASLEEP, 0.0, "", used_at=0.0)
    ways = [Descent(asleep, 0, GIB, 0, 5.0), Descent(hot, 1, 19 * GIB, GIB, 2.0)]
    least_s = min(wait_s(way, 20 * GIB) for way in ways)
    assert min(ways, key=lambda way: rank(state, way, 100.0, 20 * GIB, least_s)).replica is hot


@pytest.mark.parametrize(("colder_s", "warmer_s"), [(40.0, 15.0), (15.0, 40.0), (39.9, 10.1)])
def test_one_slow_start_on_a_busy_host_does_not_outweigh_who_was_called_last(
    colder_s: float, warmer_s: float
) -> None:
    state = ClusterState()
    node = state.node("n")
    for name, seconds, used_at in (("cold", colder_s, 90.0), ("warm", warmer_s, 91.0)):
        spec = ModelSpec(name=name, source="hf:a/a", device_memory_bytes=10 * GIB)
        made = Model(m.StoredModel(spec=spec), spec, spec.launch_key())
        times = {"start-cached": Times(samples=(seconds,))}
        key = Key(name, made.launch_key, "vllm", "1", "cpu")
        made.footprint = Footprint(key=key, times=times)
        state.models[name] = made
        state.add(
            Replica(name, name, "n", ("d",), 10 * GIB, "k", Stage.READY, 0.0, "", used_at=used_at)
        )
    there = list(node.replicas.values())
    found = cheapest_descents(state, node, there, 10 * GIB, 100.0)
    assert found is not None
    assert [way.replica.model for way in found] == ["cold"]
