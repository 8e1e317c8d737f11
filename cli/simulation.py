"""The simulator put together: the scheduler's world with the agent's nodes in it."""

from __future__ import annotations

from collections.abc import Callable

from agent.sim.node import NodeSpec, SimNode
from runtime.sim.loop import Loop
from runtime.sim.observer import Observer
from runtime.sim.timings import Timings
from scheduler.sim.policy import PolicyFactory
from scheduler.sim.report import Report
from scheduler.sim.simulator import NodePlan, Scenario, SimulatedNode
from scheduler.sim.simulator import simulate as run


def make_node(
    loop: Loop,
    plan: NodePlan,
    timings: Timings,
    observer: Observer,
    poke: Callable[[SimulatedNode], object],
    check: bool,
) -> SimulatedNode:
    """A node with the production agent core (scheduler.simulator.NodeFactory)."""
    spec = NodeSpec(
        plan.node_id, plan.devices, plan.rungs, dict(plan.labels), plan.preemptible, check
    )
    return SimNode(loop, spec, timings, observer, poke)


def simulate(scenario: Scenario, policy: PolicyFactory | None = None) -> Report:
    """Run `scenario`; `policy` makes what leads (scheduler/sim/policy.py has the contract)."""
    return run(scenario, make_node, policy)
