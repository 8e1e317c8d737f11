"""The control plane of a simulated cluster: leaders, and how commands and tables leave them. Pure.

It does what scheduler/driver.py does with sockets: commands to one node go one after the other, a
route table goes to whoever polls for a newer one, what was learnt is kept for the next leader.

Rules this file keeps:
- a deposed leader is not told: for a while it goes on deciding and sending (`zombie_s`), as one
  whose lease ran out in a pause does; the agents' epoch fence has to hold it off;
- the registry (models, pins, cordons, footprints, term) survives every leader.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from runtime.contract.footprint_ledger import Footprint, Key
from runtime.sim.loop import Loop
from runtime.wire.agent_messages import (
    AgentCommand,
    CommandReply,
    Heartbeat,
    HeartbeatReply,
    StageModels,
)
from runtime.wire.routes import DemandReport, RouteTable
from scheduler.policy.warm_value import changed_floors
from scheduler.signals.forecast import StoredArrivals
from scheduler.sim.network import Network
from scheduler.sim.policy import Policy, PolicyFactory
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState

WALL_S = 1_700_000_000.0  # the wall clock at time 0, for schedules (2023-11-14 22:13:20 UTC)


class Agent(Protocol):
    """What a leader needs of a node."""

    @property
    def up(self) -> bool:
        """Whether the node is on."""

    def command(self, command: AgentCommand) -> CommandReply | None:
        """Carry out a command; None: no answer."""


class Leader:
    """One scheduler process that leads, or believes it does."""

    def __init__(self, term: int, policy: Policy) -> None:
        self.term = term
        self.policy = policy
        self.leads = True
        self.table: RouteTable | None = None
        self.queues: dict[str, deque[AgentCommand]] = {}
        self.busy: set[str] = set()
        self.polls: dict[str, tuple[int, Callable[[RouteTable | None], object]]] = {}


class Control:
    """The registry, and who leads by it."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        agents: Mapping[str, Agent],
        factory: PolicyFactory,
        decided: Callable[[m.Decided | m.ColdStart], object],
        handled: Callable[[Policy, m.Event], object] | None = None,
    ) -> None:
        """`decided` sees every record, `handled` each event after its policy took it in."""
        self.leader: Leader | None = None
        self.models: dict[str, m.StoredModel] = {}
        self.pinned: set[str] = set()
        self.loaded: set[str] = set()  # by an operator
        self.cordoned: set[str] = set()
        self.footprints: dict[Key, Footprint] = {}
        self.quarantined: dict[tuple[str, str], str] = {}
        self.sketches: dict[str, StoredArrivals] = {}
        self.term = 0
        self._loop = loop
        self._network = network
        self._agents = agents
        self._factory = factory
        self._decided = decided
        self._handled = handled

    # -------------------------------------------------------------------- leading

    def elect(self, zombie_s: float = 0.0) -> None:
        """A new leader; the old one goes on for `zombie_s`."""
        old = self.leader
        if old is not None:
            self._loop.after(zombie_s, self._depose, old)
        self.term += 1
        self.leader = leader = Leader(self.term, self._factory())
        self.tell(
            m.Elected(
                now=self._loop.now, term=self.term,
                models=tuple(self.models.values()),
                known_nodes=tuple(name for name, agent in self._agents.items() if agent.up),
                cordoned=tuple(sorted(self.cordoned)),
                pinned=tuple(sorted(self.pinned)),
                footprints=tuple(self.footprints.values()),
                quarantined=tuple((n, d, why) for (n, d), why in self.quarantined.items()),
                sketches=dict(self.sketches),
                wall_s=WALL_S + self._loop.now,
            )
        )  # fmt: skip
        self._tick(leader)

    def tell(self, event: m.Event, leader: Leader | None = None) -> None:
        """Give an event to `leader`, else to the one that leads."""
        leader = leader or self.leader
        if leader is None or not leader.leads:
            return
        commands = leader.policy.handle(event)
        for command in commands:
            match command:
                case m.Send():
                    self._queue(leader, command.node_id, command.command)
                case m.Publish():
                    leader.table = command.table
                    self._answer_polls(leader)
                case m.Learned():
                    self.footprints[command.footprint.key] = command.footprint
                case m.Quarantined(reason=None):
                    self.quarantined.pop((command.node_id, command.device_id), None)
                case m.Quarantined():
                    self.quarantined[command.node_id, command.device_id] = str(command.reason)
                case m.Sketched():
                    self.sketches[command.model] = command.sketch
                case m.Decided() | m.ColdStart():
                    self._decided(command)
        if self._handled is not None:
            self._handled(leader.policy, event)

    def _depose(self, leader: Leader) -> None:
        leader.leads = False
        polls, leader.polls = leader.polls, {}
        for _, answer in polls.values():
            answer(None)

    def _tick(self, leader: Leader) -> None:
        if not leader.leads:
            return
        self.tell(m.Tick(now=self._loop.now), leader)
        self._set_floors(leader)
        self._loop.after(m.TICK_S, self._tick, leader)

    def _set_floors(self, leader: Leader) -> None:
        """As the driver does; a policy without the production state gets no floors."""
        state, now = getattr(leader.policy, "state", None), self._loop.now
        if isinstance(state, ClusterState):
            for name, floor in changed_floors(state.models, {}, WALL_S + now):
                self.tell(m.FloorSet(now=now, model=name, floor=floor), leader)

    # -------------------------------------------------------------------- what operators do

    def put(self, stored: m.StoredModel) -> None:
        """Add or change a model."""
        self.models[stored.spec.name] = stored
        self.tell(m.ModelPut(now=self._loop.now, model=stored))

    def remove(self, name: str) -> None:
        """Remove a model."""
        self.models.pop(name, None)
        self.pinned.discard(name)
        self.footprints = {k: f for k, f in self.footprints.items() if k.model != name}
        self.tell(m.ModelRemoved(now=self._loop.now, name=name))

    def load(self, name: str, replicas: int) -> None:
        """Start replicas of a model ahead of requests."""
        self.loaded.add(name)
        self.tell(m.LoadAsked(now=self._loop.now, model=name, replicas=replicas))

    def unload(self, name: str) -> None:
        """Drain and stop a model's replicas."""
        self.tell(m.UnloadAsked(now=self._loop.now, model=name))

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a model running, or stop to."""
        (self.pinned.add if pinned else self.pinned.discard)(name)
        self.tell(m.PinSet(now=self._loop.now, model=name, pinned=pinned))

    def cordon(self, node_id: str, cordoned: bool, drain: bool = False) -> None:
        """Place nothing new on a node, or allow it again; `drain`: move off what it runs."""
        (self.cordoned.add if cordoned else self.cordoned.discard)(node_id)
        event = m.CordonSet(now=self._loop.now, node_id=node_id, cordoned=cordoned, drain=drain)
        self.tell(event)

    def release(self) -> None:
        """An operator lets every quarantined device be used again."""
        for node_id, device_id in list(self.quarantined):
            self.tell(
                m.QuarantineSet(
                    now=self._loop.now, node_id=node_id, device_id=device_id, reason=None
                )
            )

    # -------------------------------------------------------------------- messages to it

    def heartbeat(
        self,
        leader: Leader,
        heartbeat: Heartbeat,
        answer: Callable[[HeartbeatReply | None], object],
    ) -> None:
        """At the scheduler. None: it does not lead (503)."""
        if not leader.leads:
            answer(None)
            return
        self.tell(m.HeartbeatSeen(now=self._loop.now, heartbeat=heartbeat), leader)
        answer(HeartbeatReply(term=leader.term))

    def demand(
        self, leader: Leader, report: DemandReport, answer: Callable[[bool], object]
    ) -> None:
        """At the scheduler."""
        if leader.leads:
            self.tell(m.DemandSeen(now=self._loop.now, report=report), leader)
        answer(leader.leads)

    def poll(
        self,
        leader: Leader,
        router_id: str,
        since: int,
        answer: Callable[[RouteTable | None], object],
    ) -> None:
        """At the scheduler: answer as soon as there is a newer table. None: it does not lead."""
        if not leader.leads:
            answer(None)
        elif leader.table is not None and leader.table.version > since:
            answer(leader.table)
        else:
            leader.polls[router_id] = (since, answer)

    def _answer_polls(self, leader: Leader) -> None:
        assert leader.table is not None
        for router_id, (since, answer) in list(leader.polls.items()):
            if leader.table.version > since:
                del leader.polls[router_id]
                answer(leader.table)

    # -------------------------------------------------------------------- commands to agents

    def _queue(self, leader: Leader, node_id: str, command: AgentCommand) -> None:
        leader.queues.setdefault(node_id, deque()).append(command)
        self._send_next(leader, node_id)

    def _send_next(self, leader: Leader, node_id: str) -> None:
        queue = leader.queues[node_id]
        if node_id in leader.busy or not queue:
            return
        leader.busy.add(node_id)
        command = queue.popleft()
        over = _Once(lambda reply: self._done(leader, node_id, command, reply))
        self._network.send(lambda: over(None), self._deliver, self._agents[node_id], command, over)

    def _deliver(self, agent: Agent, command: AgentCommand, over: _Once) -> None:
        """At the agent; a doubled command is obeyed twice."""
        reply = agent.command(command) if agent.up else None
        self._network.send(lambda: over(None), over, reply)

    def _done(
        self, leader: Leader, node_id: str, command: AgentCommand, reply: CommandReply | None
    ) -> None:
        leader.busy.discard(node_id)
        kind = str(command.__struct_config__.tag)
        self.tell(
            m.CommandDone(
                now=self._loop.now, node_id=node_id, kind=kind,
                replica_id="" if isinstance(command, StageModels) else command.replica_id,
                delivered=reply is not None,
                ok=reply is not None and reply.ok,
                error=reply.error if reply else "unreachable",
                boot_id=reply.boot_id if reply else 0,
                seq=reply.seq if reply else 0,
            ),
            leader,
        )  # fmt: skip
        self._send_next(leader, node_id)


class _Once:
    """Calls what it was given the first time it is called."""

    def __init__(self, action: Callable[[CommandReply | None], object]) -> None:
        self._action: Callable[[CommandReply | None], object] | None = action

    def __call__(self, reply: CommandReply | None) -> None:
        action, self._action = self._action, None
        if action is not None:
            action(reply)
