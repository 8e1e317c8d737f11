"""Each policy of bench/policy.py keeps the invariants of the core and of the simulated world."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from bench.lib.policy_runs import ABLATIONS, HOLD_S, POLICIES, Cluster, figures, run, scenario
from bench.policies.simple import Knative
from bench.policies.workloads import Case
from cli.simulation import make_node
from runtime.wire.model_spec import ModelSpec
from scheduler.sim.simulator import Simulation
from scheduler.sim.traces import Arrival, Workload
from scheduler.state.cluster import ClusterState, Demand, Model, Replica, Stage
from scheduler.state.messages import StoredModel

CLUSTER = Cluster(gpus=2, node_gpus=2, host_gib=64, on_disk="all")
LARGE = Cluster(gpus=8)


def crowded() -> Case:
    """Six models of which two devices hold four, called by turns: every policy must evict."""
    random = Random("crowded")
    names = tuple(f"m{i}" for i in range(6))
    calls = sorted(
        Arrival(random.uniform(0, 400), random.choice(names), 400, 40) for _ in range(60)
    )
    sizes = ((14.0, 1), (14.0, 1), (8.0, 1), (8.0, 1), (3.0, 1), (14.0, 2))
    return Case("crowded", 2, Workload(names, tuple(calls), 400.0), 100.0, sizes)


@pytest.mark.parametrize("name", [*POLICIES, *ABLATIONS])
def test_a_policy_keeps_the_invariants_and_answers(name: str) -> None:
    case, contender = crowded(), (POLICIES | ABLATIONS)[name]
    cluster = LARGE if name == "dedicated" else CLUSTER
    world = replace(scenario(case, contender, cluster, 1), check=True, strict=True)
    report = Simulation(world, make_node, contender.factory(case, {})).run()
    found = figures(case, name, cluster.gpus, report, 0.0)
    assert found.violations == 0
    assert found.answered >= 0.9 * found.requests
    assert 0 < found.mean_s < HOLD_S
    assert found.evictions or name in ("dedicated", "knative")


def test_a_seed_gives_the_same_figures_again() -> None:
    first, again = (run(crowded(), "gdsf", POLICIES["gdsf"], CLUSTER, 3) for _ in range(2))
    assert replace(first, wall_s=0.0) == replace(again, wall_s=0.0)


def test_settings_of_the_world_reach_every_core_and_do_not_replace_a_policys_own() -> None:
    case, world = crowded(), {"min_dwell_s": 1.25, "stand_by": False}
    for name, stand_by in (("lru", False), ("ours", True)):
        core: Any = POLICIES[name].factory(case, world)()
        settings = core._turn.settings
        assert (settings.min_dwell_s, settings.stand_by) == (1.25, stand_by)


def test_knative_asks_once_for_a_start_that_nobody_waits_for_any_more() -> None:
    """Else it and a model that waits for its turn took it from each other at each event."""
    stored = StoredModel(spec=ModelSpec(name="a", source="hf:a/a"))
    spec = stored.effective()
    model, state, knative = Model(stored, spec, spec.launch_key()), ClusterState(), Knative()
    assert knative.scale(state, model, Demand(waiting=1), 0.0).wanted == 1
    assert knative.scale(state, model, Demand(), 1.0).wanted == 0
    model.replicas["a-1"] = Replica(
        "a-1", "a", "n00", ("gpu0",), 1, model.launch_key, Stage.STARTING, 1.0, reason="best fit"
    )
    assert knative.scale(state, model, Demand(), 2.0).wanted == 1
