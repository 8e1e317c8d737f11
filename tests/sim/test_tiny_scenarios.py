"""Scenarios small enough to compute by hand: the simulator has to agree."""

from __future__ import annotations

import pytest

from cli.simulation import make_node
from runtime.contract.footprint_ledger import Footprint, Key, Times
from runtime.sim import profile as p
from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.sim import faults as f
from scheduler.sim.catalog import facts
from scheduler.sim.network import Weather
from scheduler.sim.simulator import Fault
from tests.kits.scenarios import GB, GIB, Arrival, Host, NodePlan, Simulation, run, scenario, sized

GPU = p.GPUS["H100"]
STARTED = p.FORK_S + p.INIT_S + p.CUDA_S + p.KV_S + p.COMPILE_S + p.GRAPHS_S + 0.05  # HEALTH_S
HEARD = 0.02  # messages: first wait told, start sent, readiness told, table polled


def first_token_s(billions: float, prompt: int) -> float:
    model = p.ModelFacts(weights_bytes=int(2e9 * billions))
    return p.prefill_s(GPU, model, 1, prompt) + p.step_s(GPU, model, 1, 1)


@pytest.mark.parametrize(
    ("on_disk", "disk_rate", "weights_s"),
    [
        ("all", 2 * GB, 16 / 2),  # the disk is slower than the copy to the device
        ("all", 100 * GB, 16 / 8),  # the copy is: LOAD_BYTES_S
        ("none", 2 * GB, 16 / 2.5 + 16 / 8),  # pulled; then it is in the page cache
    ],
)
def test_the_first_ttft_is_the_sum_of_the_phases(
    on_disk: str, disk_rate: float, weights_s: float
) -> None:
    node = NodePlan("n0", devices=1, host=Host(disk_rate=disk_rate))
    report = run([sized("m", 8)], [Arrival(1.0, "m", 1000, 100)], nodes=[node], on_disk=on_disk)
    assert report.outcomes == {"answered": 1}
    expected = STARTED + weights_s + first_token_s(8, 1000)
    assert report.ttft[0] == pytest.approx(expected, abs=HEARD)
    assert report.climbs == {"cached" if on_disk == "all" else "remote": 1}


@pytest.mark.parametrize("seed", range(6))
def test_what_was_used_last_stays_though_reports_come_late(seed: int) -> None:
    """Two short calls 50 ms apart, then a model that needs the room of one of the two."""
    models = [sized(name, 8, device_memory_bytes=35 * GIB, idle_s=3600.0) for name in "abc"]
    first, second = ("a", "b") if seed % 2 else ("b", "a")
    calls = [Arrival(1.0, "a", 10, 1), Arrival(60.0, "b", 10, 1)]
    calls += [Arrival(120.1 + seed / 7, first, 10, 1), Arrival(120.15 + seed / 7, second, 10, 1)]
    calls += [Arrival(122.4, "c", 10, 1)]
    late = Weather(late=0.5, late_s=0.9)
    trouble = [Fault(119.0, "reports come late", lambda s: setattr(s.network, "weather", late))]
    simulation = Simulation(
        scenario(models, calls, faults=trouble, seed=seed, duration_s=240.0), make_node
    )
    report = simulation.run()
    assert report.outcomes == {"answered": 5}
    leader = simulation.control.leader
    assert leader is not None
    assert isinstance(leader.policy, Core)
    evicted = [d.model for d in leader.policy.state.decisions if d.action == "evict"]
    assert evicted == [first]


def test_a_hot_model_answers_after_its_prefill_and_one_step() -> None:
    calls = [Arrival(1.0, "m", 10, 1), Arrival(60.0, "m", 1000, 100)]
    report = run([sized("m", 8)], calls)
    assert report.ttft[1] == pytest.approx(first_token_s(8, 1000), rel=1e-6)


def test_prompts_are_read_one_after_the_other() -> None:
    calls = [Arrival(1.0, "m", 10, 1), *[Arrival(60.0, "m", 4000, 2000)] * 3]
    report = run([sized("m", 8)], calls)
    one = p.prefill_s(GPU, p.ModelFacts(16 * 10**9), 1, 4000)
    steps = [p.step_s(GPU, p.ModelFacts(16 * 10**9), 1, n) for n in (1, 2, 3)]
    expected = [one * (i + 1) + steps[i] for i in range(3)]
    assert sorted(report.ttft)[:3] == pytest.approx(expected, rel=1e-6)


def test_a_sleeper_wakes_in_the_time_that_its_weights_take_over_pcie() -> None:
    calls = [Arrival(1.0, "m", 10, 1), Arrival(100.0, "m", 10, 1)]
    report = run([sized("m", 8, idle_s=20.0)], calls)
    assert report.climbs == {"asleep-1": 1, "cached": 1}
    wake_s = p.MAP_S + 16 / 50 + p.CANARY_S
    assert report.ttft[1] == pytest.approx(wake_s + first_token_s(8, 10), abs=HEARD)


def test_a_measured_start_wins_over_the_profile() -> None:
    times = {"start-cached": Times(samples=(7.0,)), "start-cached.weights": Times(samples=(2.0,))}
    ledger = [Footprint(key=Key("m", "", "vllm", "0.32.0", "nvml"), times=times)]
    report = run([sized("m", 8)], [Arrival(1.0, "m", 10, 1)], ledger=ledger)
    assert report.ttft[0] == pytest.approx(7.05 + first_token_s(8, 10), abs=HEARD)


def test_two_starts_on_one_node_share_its_disk() -> None:
    node = NodePlan("n0", devices=2, host=Host(disk_rate=1 * GB))
    models = [sized(name, 8, device_memory_bytes=70 * 2**30) for name in "ab"]
    report = run(models, [Arrival(1.0, name, 10, 1) for name in "ab"], nodes=[node])
    expected = STARTED + 32 / 1 + first_token_s(8, 10)
    assert report.ttft == pytest.approx([expected] * 2, abs=2 * HEARD)


def test_gpu_hours_count_what_is_occupied_and_what_is_held() -> None:
    model = sized("m", 8, idle_s=20.0, sleep="off", device_memory_bytes=40 * 2**30)
    report = run([model], [Arrival(0.0, "m", 10, 1)], duration_s=300.0)
    # It starts at 5 s, is ready after STARTED + weights, idles for 20 s and is gone soon after.
    up_s = STARTED + 16 / 6 + 20
    assert report.gpu_hours_occupied * 3600 == pytest.approx(up_s, abs=1.5)
    held_s = (up_s - (p.FORK_S + p.INIT_S)) / 2  # half of the device
    assert report.gpu_hours_held * 3600 == pytest.approx(held_s, abs=1.5)
    assert report.gpu_hours_there * 3600 == pytest.approx(report.duration_s)


def test_a_request_that_waits_longer_than_hold_s_is_refused_once() -> None:
    report = run([sized("m", 8, hold_s=3.0)], [Arrival(1.0, "m", 10, 1)])
    assert report.outcomes == {"hold_timeout": 1}
    assert report.within_objective == 0


def test_a_model_that_fits_no_device_is_refused_with_a_reason() -> None:
    report = run([sized("m", 8, device_memory_bytes=90 * 2**30)], [Arrival(1.0, "m", 10, 1)] * 2)
    assert set(report.outcomes) <= {"model_unavailable", "hold_timeout"}
    assert report.outcomes["model_unavailable"] >= 1


@pytest.mark.parametrize(("alike", "rung"), [(("x", "x"), "shell"), (("x", "y"), "staged")])
def test_a_model_that_was_here_is_served_by_the_engine_of_its_kind(
    alike: tuple[str, str], rung: str
) -> None:
    """Two models, room for one; neither may sleep. The first comes back at 120 s: what is read is
    the same, its weights from the page cache, but no process starts."""
    models = [sized(name, 8, device_memory_bytes=60 * GIB, sleep="off") for name in "ab"]
    calls = [Arrival(at_s, name, 10, 1) for at_s, name in ((1.0, "a"), (60.0, "b"), (120.0, "a"))]
    simulation = Simulation(
        scenario(models, calls, facts=facts(models, alike), duration_s=180.0), make_node
    )
    report = simulation.run()
    assert report.outcomes == {"answered": 3}
    assert report.climbs[rung] == 1
    loaded_s = 16 / 8 + first_token_s(8, 10)
    expected_s = loaded_s + (p.CANARY_S if rung == "shell" else STARTED)
    # Beside: routers confirm that they send it nothing any more; for a start, the other one ends.
    assert expected_s <= report.ttft[2] < expected_s + 1.5


def test_a_caller_that_hangs_up_ends_its_request() -> None:
    report = run([sized("m", 8)], [Arrival(1.0, "m", 10, 1, 2.0)])
    assert report.outcomes == {"hung_up": 1}


def test_requests_of_a_lost_node_break_off_and_waiting_ones_go_elsewhere() -> None:
    nodes = [NodePlan("n0", devices=1), NodePlan("n1", devices=1)]
    calls = [Arrival(1.0, "m", 10, 1), Arrival(59.0, "m", 10, 5000), Arrival(61.0, "m", 10, 1)]
    holder = [Fault(60.0, "lose", lambda sim: _lose_the_busy(sim))]
    report = run([sized("m", 8)], calls, nodes=nodes, faults=holder, duration_s=200.0)
    assert report.outcomes == {"answered": 2, "broken_off": 1}
    assert sum(report.climbs.values()) == 2


def test_a_node_that_vanishes_is_left_when_the_table_calls_it_lost() -> None:
    """As by the real router: before the first token elsewhere, after it broken off; the limit of
    TCP, 10 s, ends nothing that was told before."""
    nodes = [NodePlan("n0", devices=1), NodePlan("n1", devices=1)]
    model = sized("m", 8, min_replicas=2, max_replicas=2)
    begun = [Arrival(59.0 + i / 10, "m", 10, 5000) for i in range(8)]
    late = [Arrival(60.1 + i / 10, "m", 10, 1) for i in range(8)]
    vanish = [Fault(60.0, "vanish", lambda sim: sim.vanish_node("n0"))]
    report = run(
        [model], [*begun, *late], nodes=nodes, faults=vanish, duration_s=300.0,
        settings=Settings(node_timeout_s=3.0),
    )  # fmt: skip
    assert report.outcomes["answered"] + report.outcomes["broken_off"] == 16
    assert 0 < report.outcomes["broken_off"] < 8
    assert 1.0 < max(report.ttft) < 8.0


def test_a_vanished_node_is_noticed_without_a_scheduler_too() -> None:
    """Nobody publishes a table: TCP ends what was sent there."""
    nodes = [NodePlan("n0", devices=1), NodePlan("n1", devices=1)]
    model = sized("m", 8, min_replicas=2, max_replicas=2)
    late = [Arrival(60.1 + i / 10, "m", 10, 1) for i in range(8)]
    vanish = [Fault(60.0, "vanish", lambda sim: sim.vanish_node("n0"))]
    report = run(
        [model], late, nodes=nodes, faults=vanish, duration_s=300.0,
        settings=Settings(node_timeout_s=60.0),
    )  # fmt: skip
    assert report.outcomes == {"answered": 8}
    assert 10.0 < max(report.ttft) < 12.0


def test_a_preempted_node_is_left_before_it_goes_and_breaks_nothing_off() -> None:
    nodes = [NodePlan(name, devices=1, preemptible=True) for name in ("n0", "n1")]
    calls = [Arrival(1.0 + i, "m", 100, 50) for i in range(110)]
    faults = [Fault(50.0, "told to go", lambda sim: f.preempt(_busy(sim), 40.0)(sim))]
    report = run([sized("m", 8)], calls, nodes=nodes, faults=faults)
    assert report.outcomes == {"answered": 110}
    assert report.climbs == {"cached": 2}  # the second beside the first, which serves until then
    assert max(report.ttft[i] for i in range(40, 110)) < 1.0


def _busy(sim) -> str:
    return next(name for name, node in sim.nodes.items() if node.replicas())


def _lose_the_busy(sim) -> None:
    sim.lose_node(_busy(sim))


def test_an_engine_that_dies_is_started_again_by_its_agent() -> None:
    """While it starts (a pause of 0.5 s first) and again when it serves (at once)."""
    calls = [Arrival(1.0, "m", 10, 1), Arrival(60.0, "m", 10, 1)]
    crash = [Fault(at, "crash", _crash_all) for at in (3.0, 50.0)]
    report = run([sized("m", 8)], calls, faults=crash)
    assert report.outcomes == {"answered": 2}
    started_s = STARTED + 16 / 6
    assert report.ttft[0] == pytest.approx(2 + 0.5 + started_s, abs=0.2)
    assert report.ttft[1] == pytest.approx(started_s + 0.3 - 10, abs=0.2)


def _crash_all(sim) -> None:
    for node in sim.nodes.values():
        for replica_id in node.replicas():
            node.crash(replica_id)


def test_a_new_leader_adopts_what_runs_and_nothing_is_lost() -> None:
    calls = [Arrival(1.0 + 2 * i, "m", 100, 50) for i in range(50)]
    faults = [Fault(40.0, "fail over", f.fail_over(5.0)), Fault(70.0, "again", f.fail_over(0.0))]
    report = run([sized("m", 8)], calls, faults=faults)
    assert report.outcomes == {"answered": 50}
    assert report.climbs == {"cached": 1}
    assert report.actions["adopt"] == 2
