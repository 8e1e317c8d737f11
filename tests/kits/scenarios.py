"""Small scenarios for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from cli.simulation import make_node
from runtime.sim.profile import GB, Host
from runtime.sizes import GIB
from scheduler.sim.catalog import facts, sized
from scheduler.sim.report import Report
from scheduler.sim.simulator import NodePlan, Scenario, Simulation
from scheduler.sim.traces import Arrival
from scheduler.state.messages import StoredModel

__all__ = ["GB", "GIB", "Arrival", "Host", "NodePlan", "Simulation", "run", "scenario", "sized"]


def scenario(
    models: Sequence[StoredModel], arrivals: Sequence[Arrival], **fields: object
) -> Scenario:
    """One node with one H100, unless `fields` say otherwise."""
    known: dict[str, object] = {
        "nodes": [NodePlan("n0", devices=1)],
        "models": models,
        "arrivals": arrivals,
        "facts": facts(models),
        "duration_s": 120.0,
    }
    return Scenario(**(known | fields))  # type: ignore[arg-type]


def run(models: Sequence[StoredModel], arrivals: Sequence[Arrival], **fields: object) -> Report:
    """That scenario's report."""
    return Simulation(scenario(models, arrivals, **fields), make_node).run()
