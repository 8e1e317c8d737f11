"""What the scheduler learns: footprints, expected waits, post-mortems of cold starts."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from runtime.contract.footprint_ledger import Footprint, Key, Times
from runtime.wire.agent_messages import MemoryEstimate
from runtime.wire.model_spec import ModelSpec
from scheduler.state import messages as m
from scheduler.state.cluster import Climb, Model
from scheduler.state.learning import finished, mismatch
from tests.kits.scheduler_world import GIB, FakeNode, World, spec


def node(**fields: object) -> FakeNode:
    values = {"rungs": (1, 2), "host_budget": 64 * GIB, **fields}
    return FakeNode("n1", {"g0": 24 * GIB}, **values)  # type: ignore[arg-type]


def test_a_cold_start_leaves_a_record_whose_phases_add_up() -> None:
    world = World(node(phases={"weights": 1.0, "kv": 0.5}))
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    (record,) = world.cold_starts
    assert (record.rung, record.outcome, record.cause) == ("cached", "ready", "1 request waiting")
    assert record.moved_down == ()
    assert record.phases["weights"] == 1.0
    assert sum(record.phases.values()) == pytest.approx(record.total_s)


def test_a_record_names_what_moved_down_and_how_long_that_took() -> None:
    world = World(node(sleep_s=2.0))
    world.put(spec("a", 20), spec("b", 20))
    world.want("a")
    world.run(5)
    world.want("b")
    world.run(10)
    world.want("a")
    world.run(10)
    _, second, third = world.cold_starts
    assert second.moved_down == ("a-1-1 (a) to asleep-1",)
    assert second.phases["evict"] >= 2.0
    assert (third.rung, third.moved_down) == ("asleep-1", ("b-1-2 (b) to asleep-1",))


def test_the_wait_after_another_start_is_no_eviction() -> None:
    """Two models start on one device that has room for both, one after the other."""
    world = World(node(phases={"weights": 1.0}), starts_at_once=1)
    world.put(spec("a", 8), spec("b", 8))
    world.waiting.update({"a": 1, "b": 1})
    world.report()
    world.run(12)
    first, second = world.cold_starts
    assert (first.moved_down, second.moved_down) == ((), ())
    assert (first.phases["evict"], second.phases["evict"]) == (0.0, 0.0)
    assert first.phases["turn"] == 0.0
    assert second.phases["turn"] >= 2.0  # the start of the first
    assert [mismatch(record) for record in world.cold_starts] == [None, None]


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"queue": 0.3, "first_token": 7.83}, "add up to 8.1300 s, its total is 0.3000 s"),
        ({"queue": 0.4, "turn": -0.1}, "turn below 0 s"),
    ],
)
def test_figures_that_cannot_be_true_are_named(phases: dict[str, float], words: str) -> None:
    world = World(node())
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    (record,) = world.cold_starts
    assert mismatch(record) is None
    assert words in str(mismatch(replace(record, phases=phases, total_s=0.3)))


def test_the_first_token_stands_beside_the_phases_and_is_not_that_of_an_earlier_climb() -> None:
    world = World(node())
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    model, (replica,) = world.core.state.models["a"], world.core.state.replicas.values()
    (record,) = world.cold_starts
    assert record.after == {}
    climb = Climb("stopped", world.now - 2, 0.0, "c", "r", (), sent_at=world.now - 2)
    told = finished(9, replica, climb, "ready", world.now, 7.83)
    assert (told.after, mismatch(told)) == ({"first_token": 7.83}, None)
    model.first_token_s, model.first_token_at = 7.83, world.now  # told before the next one
    world.apply(m.UnloadAsked(now=world.now, model="a"))
    world.run(8)
    world.want("a")
    world.run(8)
    assert len(world.cold_starts) == 2
    assert "first_token" not in world.cold_starts[1].after


def test_a_failed_start_leaves_a_record_too() -> None:
    failing = node()
    failing.fails = {"a": "no such folder"}
    world = World(failing)
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    assert [(r.model, r.outcome) for r in world.cold_starts] == [("a", "failed")]


def test_times_are_learnt_kept_and_used_after_a_failover() -> None:
    world = World(node())
    world.put(spec("a", 20, idle_s=5))
    world.want("a")
    assert world.route("a").eta_s is None  # never measured: nothing is promised
    world.run(14)
    world.want("a")
    world.run(5)
    (footprint,) = world.learned.values()
    assert footprint.key.device_kind == "simulated"
    assert footprint.median_s("start-cached") == 2.0
    assert footprint.median_s("wake-1") == pytest.approx(0.5, abs=0.5)
    models = tuple(model.stored for model in world.core.state.models.values())
    world.elect(models, footprints=(footprint,))
    kept = world.core.state.models["a"].footprint
    assert kept == footprint  # the adopted replica's start is not counted twice


def test_a_changed_spec_starts_a_new_entry() -> None:
    world = World(node())
    world.put(spec("a", 20))
    world.want("a")
    world.run(5)
    world.put(spec("a", 20, engine_args={"x": 1}))
    assert world.core.state.models["a"].measured_s("start-cached") is None


def test_percentiles_by_nearest_rank_of_the_last_samples() -> None:
    times = Times()
    for seconds in range(1, 41):
        times = times.plus(float(seconds))
    assert len(times.samples) == 32
    assert (times.last_s, times.percentile_s(0.5), times.percentile_s(0.95)) == (40.0, 24.0, 39.0)
    assert Times(samples=(1.0, 2.0, 3.0, 4.0)).percentile_s(0.5) == 2.0


def test_a_key_is_a_path_of_the_registry() -> None:
    key = Key("a", "0123", "vllm", "0.32.0", "nvml")
    assert key.path() == "a/0123-vllm-0.32.0-nvml"
    assert Footprint(key=key).median_s("start-cached") is None


@pytest.mark.parametrize(
    ("declared", "kind", "measured", "booked"),
    [
        (False, "nvml", 10, 10.5),
        (False, "nvml", 19.5, 20),  # the margin alone asks for no more
        (False, "nvml", 24, 25.2),
        (False, "cpu", 1, 20),  # its KV cache is not touched yet
        (True, "nvml", 10, 20),
        (True, "nvml", 24, 25.2),
    ],
)
def test_what_is_booked_once_it_was_measured(
    declared: bool, kind: str, measured: float, booked: float
) -> None:
    size = int(20 * GIB)
    one = ModelSpec(name="a", source="/m", device_memory_bytes=size if declared else None)
    estimate = MemoryEstimate(
        weights_bytes=0, kv_bytes=0, overhead_bytes=0, total_bytes=size, explanation=""
    )
    stored = m.StoredModel(spec=one, estimate=estimate)
    model = Model(stored, stored.effective(), "k")
    assert model.booked_bytes() == size
    key = Key("a", "k", "vllm", "0.32.0", kind)
    model.footprint = Footprint(key=key, device_bytes=int(measured * GIB))
    assert model.booked_bytes() == pytest.approx(booked * GIB, rel=1e-6)
