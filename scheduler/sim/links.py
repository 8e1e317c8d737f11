"""The ties of nodes and routers to whoever leads. Pure.

They do what agent/link.py and runtime/router/control/scheduler_link.py do with sockets.

Rules this file keeps (the originals'):
- one heartbeat, one demand report and one poll under way at most; those asked for meanwhile
  become one;
- a scheduler that does not answer, leads no more or has an older term is left for the one that the
  registry names; a router asks a new one with since=0 and takes that answer whatever its version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from runtime.contract.config import AgentConfig
from runtime.sim.loop import Loop
from runtime.wire.agent_messages import Heartbeat, HeartbeatReply
from runtime.wire.routes import REPORT_S, DemandReport, RouteTable
from scheduler.sim.control_plane import Control, Leader
from scheduler.sim.network import Network

HEARTBEAT_S = AgentConfig().heartbeat_s
LINK_RETRY_S = 0.2  # [as] between a router's attempts, where production waits 0.05 to 1 s by chance


class LinkedNode(Protocol):
    """The parts of a node that a link uses."""

    @property
    def up(self) -> bool:
        """Whether the node is on."""

    def heartbeat(self) -> Heartbeat:
        """The heartbeat that the agent would send now."""

    def see_term(self, term: int) -> bool:
        """Note the term of a scheduler that answered; False: it leads no more."""


class NodeLink:
    """Heartbeats: each second, and soon after `poke`."""

    def __init__(self, loop: Loop, network: Network, control: Control, node: LinkedNode) -> None:
        self._loop, self._network, self._control, self._node = loop, network, control, node
        self._leader: Leader | None = None
        self._call = 0  # the heartbeat under way, or the timer of the next one
        self._sending = False
        self._poked = False
        self._forgot = False

    def poke(self) -> None:
        """Do not wait for the interval's end."""
        if self._poked or not self._node.up:
            return
        self._poked = True
        if not self._sending:
            self._call += 1
            self._loop.after(0.0, self._send, self._call)

    def forget(self) -> None:
        """The connection to the leader broke: the next heartbeat asks the registry."""
        self._leader = None
        self._forgot = True

    def start(self, after_s: float) -> None:
        """The first heartbeat."""
        self._poked = self._sending = False
        self._call += 1
        self._loop.after(after_s, self._send, self._call)

    def _send(self, call: int) -> None:
        if call != self._call or not self._node.up:
            return
        leader = self._leader or self._control.leader
        if leader is None:
            self._wait(HEARTBEAT_S)
            return
        self._sending, self._poked = True, False
        self._call += 1
        call = self._call

        def answer(reply: HeartbeatReply | None) -> None:
            self._network.send(lambda: self._over(call, leader, None), arrive, reply)

        def arrive(reply: HeartbeatReply | None) -> None:
            self._over(call, leader, reply)

        self._network.send(
            lambda: self._over(call, leader, None),
            self._control.heartbeat, leader, self._node.heartbeat(), answer,
        )  # fmt: skip

    def _over(self, call: int, leader: Leader, reply: HeartbeatReply | None) -> None:
        if call != self._call:
            return  # answered twice, or the node was lost meanwhile
        self._sending = False
        if reply is not None and self._node.see_term(reply.term):
            self._leader = None if self._forgot else leader
            self._forgot = False
            self._wait(0.0 if self._poked else HEARTBEAT_S)
            return
        self._leader = None
        moved = self._control.leader is not leader
        self._wait(0.0 if moved or self._poked else HEARTBEAT_S)

    def _wait(self, seconds: float) -> None:
        self._sending = False
        self._call += 1
        self._loop.after(seconds, self._send, self._call)


class RouterLink:
    """Tables in, demand out."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        control: Control,
        router_id: str,
        demand: Callable[[int], DemandReport],
        take: Callable[[RouteTable], object],
    ) -> None:
        """`demand` makes the report of that number, `take` puts a table in force."""
        self._loop, self._network, self._control = loop, network, control
        self._router_id = router_id
        self._demand, self._take = demand, take
        self._leader: Leader | None = None
        self._last_term = 0
        self._since = 0
        self._seq = 0
        self._poll_call = self._report_call = 0
        self._reporting = self._due = False

    def start(self) -> None:
        """Begin to poll and to report."""
        self._poll(0)
        self._report(0)

    def report_soon(self) -> None:
        """Do not wait for the second's end."""
        if not self._due:
            self._due = True
            if not self._reporting:
                self._report_call += 1
                self._loop.after(0.0, self._report, self._report_call)

    # -------------------------------------------------------------------- tables

    def _find(self) -> Leader | None:
        if self._leader is None:
            leader = self._control.leader
            if leader is not None and leader.term >= self._last_term:
                self._leader, self._since, self._last_term = leader, 0, leader.term
        return self._leader

    def _poll(self, call: int) -> None:
        if call != self._poll_call:
            return
        self._poll_call += 1
        call = self._poll_call
        leader = self._find()
        if leader is None:
            self._loop.after(LINK_RETRY_S, self._poll, call)
            return
        since = self._since

        def answer(table: RouteTable | None) -> None:
            self._network.send(lambda: arrive(None), arrive, table)

        def arrive(table: RouteTable | None) -> None:
            self._polled(call, leader, since, table)

        self._network.send(
            lambda: arrive(None), self._control.poll, leader, self._router_id, since, answer
        )

    def _polled(self, call: int, leader: Leader, since: int, table: RouteTable | None) -> None:
        if call != self._poll_call:
            return
        if table is None:
            self._failed()
            self._loop.after(LINK_RETRY_S, self._poll, call)
            return
        if self._leader is leader and not (since and table.version <= since):
            self._since = table.version
            self._take(table)
            self.report_soon()
        self._poll(call)

    # -------------------------------------------------------------------- demand

    def _report(self, call: int) -> None:
        if call != self._report_call:
            return
        self._report_call += 1
        call = self._report_call
        leader = self._find()
        if leader is None:
            self._loop.after(LINK_RETRY_S, self._report, call)
            return
        self._reporting, self._due = True, False
        self._seq += 1

        def answer(leads: bool) -> None:
            self._network.send(lambda: arrive(False), arrive, leads)

        def arrive(taken: bool) -> None:
            self._reported(call, taken)

        self._network.send(
            lambda: arrive(False), self._control.demand, leader, self._demand(self._seq), answer
        )

    def _reported(self, call: int, taken: bool) -> None:
        if call != self._report_call:
            return
        self._reporting = False
        if not taken:
            self._failed()
            self._loop.after(LINK_RETRY_S, self._report, call)
            return
        self._loop.after(0.0 if self._due else REPORT_S, self._report, call)

    def _failed(self) -> None:
        self._leader = None
