"""Calls to agents: commands, and whatever else the scheduler asks a node.

Rules this file keeps: commands to one node are sent one after the other, so a stop never overtakes
its start; each command is answered once, also where its agent could not be reached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp
import msgspec

from runtime import places
from runtime.outside import decode
from runtime.sockets import tcp_connector
from runtime.wire.agent_messages import AgentCommand, CommandReply, StageModels
from scheduler.core.decisions import Core
from scheduler.state import messages as m
from scheduler.tasks import Tasks

log = logging.getLogger("stoker.scheduler")

COMMAND_TIMEOUT_S = 5.0

Done = Callable[[m.CommandDone], None]


class AgentCalls:
    """The agents that have reported to `core`. `clock` is that of all events."""

    def __init__(self, core: Core, token: str, tasks: Tasks, clock: Callable[[], float]) -> None:
        self._core = core
        self._token = token
        self._tasks = tasks
        self._clock = clock
        self._queues: dict[str, asyncio.Queue[tuple[AgentCommand, Done]]] = {}
        self._session: aiohttp.ClientSession | None = None

    def address(self, node_id: str) -> str | None:
        """The base URL of a node's agent, once it has reported."""
        node = self._core.state.nodes.get(node_id)
        return node.heartbeat.address if node and node.heartbeat else None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The session for calls to agents, made with the first one."""
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._token}"}
            self._session = aiohttp.ClientSession(headers=headers, connector=tcp_connector())
        return self._session

    def send(self, node_id: str, command: AgentCommand, done: Done) -> None:
        """Send a command after those before it; `done` is called with what came of it."""
        if node_id not in self._queues:
            self._queues[node_id] = asyncio.Queue()
            self._tasks.spawn(self._send_queued(node_id, self._queues[node_id]))
        self._queues[node_id].put_nowait((command, done))

    def drop_queued(self) -> None:
        """Forget what was not sent yet; a command that is under way ends."""
        for queue in self._queues.values():
            while not queue.empty():
                queue.get_nowait()

    async def close(self) -> None:
        """Close the session; the tasks that send are ended before."""
        if self._session is not None:
            await self._session.close()

    async def _send_queued(
        self, node_id: str, queue: asyncio.Queue[tuple[AgentCommand, Done]]
    ) -> None:
        while True:
            command, done = await queue.get()
            done(await self._send(node_id, command))

    async def _send(self, node_id: str, command: AgentCommand) -> m.CommandDone:
        kind = command.__struct_config__.tag
        assert isinstance(kind, str)
        replica_id = "" if isinstance(command, StageModels) else command.replica_id
        answer, error = await self._post(node_id, command)
        if answer is None:
            log.warning("could not %s %s on %s: %s", kind, replica_id, node_id, error)
        return m.CommandDone(
            now=self._clock(), node_id=node_id, replica_id=replica_id, kind=kind,
            delivered=answer is not None, ok=answer is not None and answer.ok,
            error=answer.error if answer else error,
            boot_id=answer.boot_id if answer else 0, seq=answer.seq if answer else 0,
        )  # fmt: skip

    async def _post(self, node_id: str, command: AgentCommand) -> tuple[CommandReply | None, str]:
        """The agent's reply, or None and why there is none."""
        address = self.address(node_id)
        if address is None:
            return None, f"node {node_id} has not reported an address"
        timeout = aiohttp.ClientTimeout(total=COMMAND_TIMEOUT_S)
        try:
            where, body = places.url(address, "agent", "commands"), msgspec.json.encode(command)
            async with self.http.post(where, data=body, timeout=timeout) as response:
                body = await response.read()
                if response.status == 200:
                    return decode(body, CommandReply), ""
                return None, f"HTTP {response.status}: {body[:200].decode(errors='replace')}"
        except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
            return None, f"{type(problem).__name__}: {problem}"
