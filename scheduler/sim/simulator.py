"""A cluster in virtual time: the production cores over a modelled world. Pure; docs/simulator.md.

Rules this file keeps:
- one seed reproduces a run exactly: nothing reads a clock, all randomness is one `Random(seed)`,
  and nothing depends on the order of a set;
- the agents come in through `NodeFactory`, since the scheduler may not import the agent
  (cli/simulation.py plugs in agent/sim/node.py);
- with `check`, the invariants hold after every event, or the run ends with a Violation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

from runtime.contract.footprint_ledger import Footprint
from runtime.sim.loop import Loop
from runtime.sim.observer import Job, Observer
from runtime.sim.profile import Host, ModelFacts, gpu
from runtime.sim.timings import Timings, by_model
from runtime.wire.agent_messages import AgentCommand, CommandReply, Heartbeat
from scheduler.core.turn import Settings
from scheduler.sim.control_plane import Control
from scheduler.sim.links import NodeLink
from scheduler.sim.network import Network
from scheduler.sim.policy import Policy, PolicyFactory, production
from scheduler.sim.report import OBJECTIVE_S, Report, make_report
from scheduler.sim.routers import Answer, Router
from scheduler.sim.rule_checker import Truth, Violation
from scheduler.sim.traces import Arrival
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState, check_invariants

SAMPLES = 1000  # of queue and memory, over the whole run
HOST = Host()
SETTINGS = Settings()
CHECK_ADMISSION = 64  # its invariants cost a walk over all requests: after so many events


@dataclass(frozen=True)
class NodePlan:
    """One node of a scenario."""

    node_id: str
    devices: int = 8
    gpu: str = "H100"
    host: Host = HOST
    rungs: tuple[int, ...] = (1, 2)
    labels: Mapping[str, str] = field(default_factory=dict)
    preemptible: bool = False


@dataclass(frozen=True)
class Fault:
    """Something that is done to the world at a time; `act` gets the simulation."""

    at_s: float
    what: str
    act: Callable[[Simulation], object]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that a run depends on.

    `arrivals` in order of time; `facts` by model name; `on_disk`: which models' files every node
    has at the start. The run ends `settle_s` after the last arrival or fault, at the latest once
    nothing is open any more.
    """

    nodes: Sequence[NodePlan]
    models: Sequence[m.StoredModel]
    arrivals: Iterable[Arrival] = ()
    seed: int = 0
    facts: Mapping[str, ModelFacts] = field(default_factory=dict)
    ledger: Sequence[Footprint] = ()
    on_disk: Literal["all", "none"] = "all"
    learned: Sequence[Footprint] = ()  # what the first leader already knows
    faults: Sequence[Fault] = ()
    routers: int = 1
    settings: Settings = SETTINGS
    duration_s: float = 3600.0
    lead_s: float = 5.0  # arrivals and faults are so much later: the first leader recovers first
    settle_s: float = 900.0
    objective_s: float = OBJECTIVE_S
    transit_s: float = 0.0
    check: bool = True
    strict: bool = True
    keep_segments: bool = True


class SimulatedNode(Protocol):
    """A node as agent/sim/node.py makes it."""

    node_id: str
    preempted_at: float | None

    @property
    def up(self) -> bool:
        """Whether the node is on."""

    @property
    def failing(self) -> dict[str, str]:
        """Models whose starts fail here, and how."""

    @property
    def bad_canary(self) -> set[str]:
        """Models whose next wake fails here."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The ids of its devices."""

    def command(self, command: AgentCommand) -> CommandReply | None:
        """Carry out a command; None: no answer."""

    def heartbeat(self) -> Heartbeat:
        """The heartbeat that the agent would send now."""

    def see_term(self, term: int) -> bool:
        """Note the term of a scheduler that answered; False: it leads no more."""

    def submit(self, replica_id: str, job: Job) -> Answer:
        """Send a request to a replica."""

    def drop(self, replica_id: str, job: Job) -> None:
        """Hang up on a request."""

    def lose(self) -> None:
        """Turn the node off: its engines die with it."""

    def vanish(self) -> None:
        """Turn the node off without breaking its connections."""

    def restart_agent(self) -> None:
        """Start the agent again."""

    def crash(self, replica_id: str, kind: str = "crash") -> None:
        """Have a replica's process die."""

    def fault(self, device_id: str, reason: str | None) -> None:
        """Have a device show an error; None: it is well again."""

    def set_disk_rate(self, rate: float) -> None:
        """Read the disk at so many bytes per second from now on."""

    def has_on_disk(self, source: str, size: int) -> None:
        """Put a model on the disk that came by another way."""

    def replicas(self) -> tuple[str, ...]:
        """The ids of its replicas."""


class NodeFactory(Protocol):
    """Makes the nodes. `poke` is called when a heartbeat should be sent at once."""

    def __call__(
        self,
        loop: Loop,
        plan: NodePlan,
        timings: Timings,
        observer: Observer,
        poke: Callable[[SimulatedNode], object],
        check: bool,
    ) -> SimulatedNode: ...


class Simulation:
    """One run. Faults act on it: `nodes`, `control`, `network`, `routers`."""

    def __init__(
        self, scenario: Scenario, nodes: NodeFactory, policy: PolicyFactory | None = None
    ) -> None:
        self.scenario = scenario
        self.loop = Loop()
        self.random = Random(scenario.seed)
        self.network = Network(self.loop, self.random.random)
        self.truth = Truth(
            self.loop,
            min_dwell_s=scenario.settings.min_dwell_s,
            keep_segments=scenario.keep_segments,
            strict=scenario.strict,
        )
        self.nodes: dict[str, SimulatedNode] = {}
        self.control = Control(
            self.loop, self.network, self.nodes, policy or production(scenario.settings),
            self.truth.decided, self._check_policy if scenario.check else None,
        )  # fmt: skip
        self._links: dict[str, NodeLink] = {}
        self._make_nodes(nodes)
        self.routers = [
            Router(
                self.loop, self.network, self.control, f"router-{i}", self.nodes,
                self.truth.ended, scenario.transit_s,
            )
            for i in range(scenario.routers)
        ]  # fmt: skip
        self._turn = 0
        self._last_at = 0.0  # of arrivals and faults
        self._arrivals: Iterator[Arrival] = iter(scenario.arrivals)
        self._more = True

    # -------------------------------------------------------------------- running

    def run(self) -> Report:
        """To the end. Raises Violation."""
        scenario = self.scenario
        self.begin()
        self.advance(scenario.lead_s + scenario.duration_s)
        deadline = max(self.loop.now, self._last_at) + scenario.settle_s
        while (self._more or self.open()) and self.loop.now < deadline:
            self.advance(min(5.0, deadline - self.loop.now))
        return self.finish()

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        self.loop.run(self.loop.now + seconds, self._check if self.scenario.check else None)

    def finish(self) -> Report:
        """The report of what ran until now. Raises Violation where a request has not ended."""
        if self.open():
            waiting = sorted({r.model for router in self.routers for r in router.open.values()})
            self.truth.violated(
                f"{self.open()} requests have not ended {self.scenario.settle_s:g} s after the"
                f" last one came, of {', '.join(waiting[:5])}"
            )
        self.truth.close()
        return make_report(
            self.truth, seed=self.scenario.seed, duration_s=self.loop.now,
            models=len(self.scenario.models), events=self.loop.events,
            objective_s=self.scenario.objective_s,
        )  # fmt: skip

    def begin(self) -> None:
        """Elect the first leader, start the agents and routers."""
        scenario = self.scenario
        for stored in scenario.models:
            self.control.models[stored.spec.name] = stored
        for known in scenario.learned:
            self.control.footprints[known.key] = known
        self.control.elect()
        for index, link in enumerate(self._links.values()):
            link.start(index / max(1, len(self._links)))  # agents do not beat in step
        for router in self.routers:
            router.link.start()
        for fault in scenario.faults:
            self._later(fault.at_s, self._inject, fault)
        self._sample(max(1.0, scenario.duration_s / SAMPLES))
        self._next_arrival()

    def _make_nodes(self, factory: NodeFactory) -> None:
        scenario = self.scenario
        ledger = by_model(scenario.ledger)
        for plan in scenario.nodes:
            timings = Timings(gpu(plan.gpu), plan.host, scenario.facts, ledger)
            node = factory(self.loop, plan, timings, self.truth, self._poke, scenario.check)
            self.nodes[plan.node_id] = node
            for device_id in node.devices:
                self.truth.sizes[device_id] = timings.gpu.memory_bytes
            self._links[plan.node_id] = NodeLink(self.loop, self.network, self.control, node)
            if scenario.on_disk == "all":
                for stored in scenario.models:
                    spec = stored.effective()
                    node.has_on_disk(spec.source, timings.of(spec).weights_bytes)

    def _poke(self, node: SimulatedNode) -> None:
        link = self._links.get(node.node_id)
        if link is not None:
            link.poke()

    def _inject(self, fault: Fault) -> None:
        fault.act(self)

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._more = False
        else:
            self._later(arrival.at_s, self._arrive, arrival)

    def _later(self, at_s: float, action: Callable[..., object], what: object) -> None:
        at_s += self.scenario.lead_s
        self._last_at = max(self._last_at, at_s)
        self.loop.at(at_s, action, what)

    def _arrive(self, arrival: Arrival) -> None:
        self._turn = (self._turn + 1) % len(self.routers)
        self.routers[self._turn].arrive(
            arrival.model, arrival.prompt_tokens, arrival.output_tokens, arrival.patience_s
        )
        self._next_arrival()

    def _sample(self, every_s: float) -> None:
        self.truth.sample(sum(router.waiting() for router in self.routers))
        self.loop.after(every_s, self._sample, every_s)

    def open(self) -> int:
        """Requests that have not ended."""
        return sum(len(router.open) for router in self.routers)

    # -------------------------------------------------------------------- what faults do

    def lose_node(self, node_id: str) -> None:
        """Turn a node off."""
        node = self.nodes[node_id]
        if node.up:
            node.lose()

    def vanish_node(self, node_id: str) -> None:
        """Turn a node off without breaking its connections."""
        node = self.nodes[node_id]
        if node.up:
            node.vanish()

    def return_node(self, node_id: str) -> None:
        """Start a node's agent: after a loss without engines, else it adopts those that run."""
        node = self.nodes[node_id]
        node.restart_agent()
        self._links[node_id].start(0.0)

    def fail_over(self, zombie_s: float, torn: Iterable[str]) -> None:
        """Elect a new leader; nodes of `torn` lose their connection to the old one at once, the
        others follow it until it stops answering."""
        self.control.elect(zombie_s)
        for node_id in torn:
            self._links[node_id].forget()

    # -------------------------------------------------------------------- invariants

    def _check_policy(self, policy: Policy, event: m.Event) -> None:
        state = getattr(policy, "state", None)
        if isinstance(state, ClusterState):
            try:
                check_invariants(state)
            except AssertionError as error:
                raise Violation(
                    f"at {self.loop.now:.3f} s, after {type(event).__name__}: {error}"
                ) from error

    def _check(self) -> None:
        if self.loop.events % CHECK_ADMISSION == 0:
            for router in self.routers:
                router.admission.check_invariants()


def simulate(scenario: Scenario, nodes: NodeFactory, policy: PolicyFactory | None = None) -> Report:
    """Run `scenario` under `policy` (the production core where there is none given)."""
    return Simulation(scenario, nodes, policy).run()
