"""Random scenarios: a cluster, its models, its callers and its troubles, all from one seed. Pure.

Rules this file keeps:
- trouble ends before the end: messages arrive again, nodes are back, cordons and pins are lifted,
  starts succeed; from then on demand has to be met or reported unfit;
- afterwards every model is asked for once more; each such request must be answered, or refused
  with a reason.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from runtime.sim.profile import GB, Host, ModelFacts
from runtime.sizes import GIB
from scheduler.core.turn import Settings
from scheduler.sim import faults as f
from scheduler.sim.catalog import facts, sized
from scheduler.sim.network import FAIR, Weather
from scheduler.sim.policy import PolicyFactory
from scheduler.sim.report import Report
from scheduler.sim.simulator import Fault, NodeFactory, NodePlan, Scenario, Simulation
from scheduler.sim.traces import Arrival
from scheduler.state.messages import StoredModel

TROUBLE_S = 120.0
CALM_S = 40.0  # nothing happens: what trouble left behind may settle
LAST_CALL_S = 290.0  # less than hold_s; a large model is pulled from a shared store meanwhile
EXPLAINED = ("answered", "model_unavailable")


def random_scenario(seed: int) -> Scenario:
    """The scenario of that seed, always the same."""
    random = Random(f"stoker scenario {seed}")
    nodes = [_node(random, i) for i in range(random.randint(1, 3))]
    models = [_model(random, i) for i in range(random.randint(2, 9))]
    names = [stored.spec.name for stored in models]
    troubles = _troubles(random, nodes, names) if random.random() < 0.85 else []
    ends = [Fault(TROUBLE_S, "all is well again", _all_well)]
    calls = _calls(random, names)
    return Scenario(
        nodes=nodes,
        models=models,
        arrivals=calls,
        seed=seed,
        facts=_alike(seed, facts(models)),
        on_disk=random.choice(("all", "none")),
        faults=sorted([*troubles, *ends], key=lambda fault: fault.at_s),
        routers=random.choice((1, 1, 2)),
        settings=Settings(
            min_dwell_s=random.choice((0.0, 3.0, 5.0)),
            drain_grace_s=random.choice((5.0, 60.0)),
        ),
        duration_s=TROUBLE_S + CALM_S,
        settle_s=400.0,
        transit_s=random.choice((0.0, 0.001, 0.02)),
    )


def run_random(seed: int, nodes: NodeFactory, policy: PolicyFactory | None = None) -> Report:
    """Run the scenario of that seed, then call each model once more. Raises Violation."""
    simulation = Simulation(random_scenario(seed), nodes, policy)
    simulation.begin()
    simulation.advance(simulation.scenario.lead_s + simulation.scenario.duration_s)
    end_what_is_open(simulation)
    for name in sorted(simulation.control.models):
        began = simulation.loop.now
        request = simulation.routers[0].arrive(name, 100, 10)
        while simulation.loop.now < began + LAST_CALL_S:
            if request.ended is not None:
                break
            simulation.advance(1.0)
        if request.ended not in EXPLAINED:
            simulation.truth.violated(
                f"all was well, yet a request for {name} that came at {began:.1f} s"
                f" {f'ended as {request.ended}' if request.ended else 'waits forever'}"
            )
    return simulation.finish()


def end_what_is_open(simulation: Simulation) -> None:
    """Let the requests of the troubled time end, by hold_s at the latest."""
    deadline = simulation.loop.now + simulation.scenario.settle_s
    while simulation.open() and simulation.loop.now < deadline:
        simulation.advance(5.0)


def _alike(seed: int, known: dict[str, ModelFacts]) -> dict[str, ModelFacts]:
    """Some models of one size are of one architecture."""
    random = Random(f"stoker architectures {seed}")
    if random.random() < 0.4:
        return known
    return {
        name: replace(one, architecture=random.choice(("", "x", "x", "y")))
        for name, one in known.items()
    }


def _node(random: Random, index: int) -> NodePlan:
    return NodePlan(
        f"n{index}",
        devices=random.randint(1, 3),
        gpu=random.choice(("A100", "H100", "L40S")),
        host=Host(
            memory_bytes=random.choice((64, 256, 1024)) * GIB,
            disk_bytes=random.choice((200 * GB, 7000 * GB)),
            disk_rate=random.choice((1.0, 6.0)) * GB,
        ),
        rungs=random.choice(((1, 2), (1, 2), (2,), ())),
        preemptible=random.random() < 0.2,
    )


def _model(random: Random, index: int) -> StoredModel:
    tensor_parallel = random.choice((1, 1, 1, 1, 2))
    return sized(
        f"m{index}",
        random.choice((0.5, 3.0, 8.0, 8.0, 14.0, 14.0, 20.0)) * tensor_parallel,
        tensor_parallel,
        max_replicas=random.randint(1, 3),
        min_replicas=random.choice((0, 0, 0, 0, 1)),
        idle_s=random.choice((5.0, 20.0, 100.0)),
        asleep_s=random.choice((10.0, 60.0, 3600.0)),
        target_concurrency=random.choice((1, 4, 16)),
        priority=random.choice((0, 0, 0, -5, 5)),
        hold_s=random.choice((20.0, 300.0)) if random.random() < 0.3 else 300.0,
        max_queue=random.choice((4, 1024, 1024, 1024)),
        sleep=random.choice(("auto", "auto", "auto", "off")),
    )


def _calls(random: Random, names: list[str]) -> list[Arrival]:
    calls = []
    for name in names:
        at_s = random.uniform(0, 60)
        while at_s < TROUBLE_S:
            for _ in range(random.choice((1, 1, 1, 5, 20))):
                calls.append(
                    Arrival(
                        at_s + random.uniform(0, 0.5), name, random.choice((10, 500, 8000)),
                        random.choice((1, 50, 400)),
                        random.uniform(0.1, 40) if random.random() < 0.1 else None,
                    )
                )  # fmt: skip
            at_s += random.expovariate(1 / random.choice((3.0, 15.0, 60.0)))
    return sorted(calls, key=lambda call: call.at_s)


def _troubles(random: Random, nodes: list[NodePlan], names: list[str]) -> list[Fault]:
    troubles = []
    for _ in range(random.randint(1, 10)):
        troubles += _trouble(random, random.uniform(1, TROUBLE_S - 10), nodes, names)
    return [fault for fault in troubles if fault.at_s < TROUBLE_S]


def _trouble(random: Random, at_s: float, nodes: list[NodePlan], names: list[str]) -> list[Fault]:
    node = random.choice(nodes)
    model = random.choice(names)
    later = at_s + random.choice((1.0, 5.0, 20.0, 60.0))
    match random.randrange(15):
        case 0:
            back = f.return_node(node.node_id)
            words, goes = random.choice((("is lost", f.lose_node), ("vanishes", f.vanish_node)))
            return [
                Fault(at_s, f"{node.node_id} {words}", goes(node.node_id)),
                Fault(later, f"{node.node_id} is back", back),
            ]
        case 1:
            act = f.restart_agent(node.node_id)
            return [Fault(at_s, f"the agent of {node.node_id} restarts", act)]
        case 2 | 3:
            rough = Weather(
                lost=random.choice((0.05, 0.3)), doubled=random.choice((0.0, 0.2)),
                late=random.choice((0.0, 0.2)), late_s=random.choice((0.2, 3.0, 10.0)),
            )  # fmt: skip
            return [
                Fault(at_s, "messages fare badly", f.weather(rough)),
                Fault(later, "messages fare well", f.fair()),
            ]
        case 4:
            rate = random.choice((0.05, 0.5)) * GB
            act = f.slow_disk(node.node_id, rate)
            return [Fault(at_s, f"the disk of {node.node_id} is slow", act)]
        case 5 | 6:
            zombie_s = random.choice((0.0, 0.0, 2.0, 10.0))
            torn = tuple(n.node_id for n in nodes if random.random() < 0.5)
            return [Fault(at_s, "another scheduler leads", f.fail_over(zombie_s, torn))]
        case 7 | 8:
            return [Fault(at_s, "an engine dies", f.crash_one(random))]
        case 9:
            kind = random.choice(("oom", "bad_model", "crash"))
            return [
                Fault(at_s, f"{model} does not start: {kind}", f.starts_fail(model, kind)),
                Fault(later, f"{model} starts again", f.starts_fail(model, None)),
            ]
        case 10:
            return [Fault(at_s, f"{model} wakes badly", f.bad_canary(model))]
        case 11:
            index = random.randrange(node.devices)
            act, repair = (
                f.device_fault(node.node_id, index, reason) for reason in ("XID 79", None)
            )
            return [
                Fault(at_s, f"device {index} of {node.node_id} fails", act),
                Fault(later, f"device {index} of {node.node_id} is well", repair),
            ]
        case 12:
            drain = random.random() < 0.5
            act = f.cordon(node.node_id, True, drain)
            return [
                Fault(at_s, f"{node.node_id} is cordoned", act),
                Fault(later, f"{node.node_id} is uncordoned", f.cordon(node.node_id, False)),
            ]
        case 13:
            act = f.preempt(node.node_id, random.choice((5.0, 30.0)))
            return [
                Fault(at_s, f"{node.node_id} is told that it will be taken away", act),
                Fault(later + 30.0, f"{node.node_id} is back", f.return_node(node.node_id)),
            ]
        case _:
            act = random.choice((f.unload(model), f.load(model), f.pin(model, True)))
            return [Fault(at_s, f"an operator acts on {model}", act)]


def _all_well(sim: Simulation) -> None:
    sim.network.weather = FAIR
    for plan in sim.scenario.nodes:
        node = sim.nodes[plan.node_id]
        node.failing.clear()
        node.bad_canary.clear()
        node.set_disk_rate(plan.host.disk_rate)
        node.preempted_at = None
        if not node.up:
            sim.return_node(plan.node_id)
        for device_id in node.devices:
            node.fault(device_id, None)
        if plan.node_id in sim.control.cordoned:
            sim.control.cordon(plan.node_id, False)
    sim.control.release()
    for name in sorted(sim.control.loaded & sim.control.models.keys()):
        sim.control.unload(name)  # what an operator wished for ends too, as pins do
    for name, stored in list(sim.control.models.items()):
        if name in sim.control.pinned:
            sim.control.pin(name, False)
        sim.control.put(_without_minimum(stored))


def _without_minimum(stored: StoredModel) -> StoredModel:
    """So that no model keeps another from its last call forever."""
    fields = {name: getattr(stored.spec, name) for name in stored.spec.__struct_fields__}
    spec = type(stored.spec)(**(fields | {"min_replicas": 0, "hold_s": 300.0}))
    return StoredModel(spec=spec, estimate=stored.estimate)
