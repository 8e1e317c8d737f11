"""Runs the core in the world: leads or stands by, feeds events in, carries commands out.

Rules this file keeps: it decides nothing; the core is called on the event loop only, one event at a
time; a scheduler that is not the leader touches nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import aiohttp
import msgspec
import tenacity

from runtime import places
from runtime.contract.config import Config
from runtime.contract.footprint_ledger import Footprint, Key
from runtime.contract.prewarm import Ask
from runtime.outside import decode
from runtime.registry.protocol import Entry, Lock, Registry, RegistryError
from runtime.sockets import tcp_connector
from runtime.wire.agent_messages import AgentCommand, CommandReply, StageModels
from runtime.wire.routes import RouteTable
from scheduler.access import Access
from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.policy.floors import changed_floors
from scheduler.policy.learning import mismatch
from scheduler.route_book import RuleBook
from scheduler.signals.forecast import StoredArrivals
from scheduler.state import messages as m
from scheduler.store import Store

log = logging.getLogger("stoker.scheduler")

LEADER_TTL_S = 6.0  # Consul's shortest is 10 s: the registry rounds up
COMMAND_TIMEOUT_S = 5.0
SAVE_S = 5.0


def _readable(entries: Iterable[Entry]) -> Iterator[Footprint]:
    """The entries of this version of Stoker; what another one wrote is measured again."""
    for entry in entries:
        with contextlib.suppress(ValueError):
            yield decode(entry.value, Footprint)


def _sketches(entries: Iterable[Entry]) -> Iterator[tuple[str, StoredArrivals]]:
    """The arrivals by model that this version wrote; what another one wrote is learnt again."""
    for entry in entries:
        with contextlib.suppress(ValueError):
            yield entry.key.rsplit("/", 1)[1], decode(entry.value, StoredArrivals)


def _quarantined(entry: Entry) -> tuple[str, str, str]:
    _, node_id, device_id = entry.key.rsplit("/", 2)
    return node_id, device_id, entry.value.decode(errors="replace")


class NodeFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What the registry keeps of a node."""

    cordoned: bool = False


class Driver:
    """One scheduler process. `leads` tells whether it may act."""

    def __init__(self, config: Config, registry: Registry) -> None:
        self.config = config
        self.store = Store(registry, config.registry.prefix)
        settings = config.scheduler
        self.core = Core(
            Settings(
                node_timeout_s=settings.node_timeout_s,
                recovery_grace_s=settings.recovery_grace_s,
                drain_grace_s=settings.drain_grace_s,
                min_dwell_s=settings.min_dwell_s,
                stand_by=settings.stand_by,
            )
        )
        self.access = Access(self.store, self.now)
        self.rules = RuleBook(self.store, self)
        self.leads = False
        self.why_not_leading = ""  # what the last try to lead failed of
        self._outranked = False
        self.url = ""
        self.table: RouteTable | None = None
        self.decided: dict[str, int] = {}  # decisions made, by action, for the metrics
        self.on_cold_start: Callable[[m.ColdStart], None] = lambda _: None  # the metrics' hook
        self._asks: dict[str, tuple[Ask, ...]] = {}
        self._unsaved: dict[Key, Footprint] = {}
        self._sketches: dict[str, StoredArrivals] = {}  # not saved yet
        self._learned = asyncio.Event()
        self._table_changed = asyncio.Event()
        self._demand_seen = asyncio.Event()
        self._senders: dict[str, asyncio.Queue[AgentCommand]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None

    # ------------------------------------------------------------------------------- events

    def now(self) -> float:
        """The one clock of all events."""
        return asyncio.get_running_loop().time()

    def apply(self, event: m.Event) -> None:
        """Hand one event to the core and begin to carry out what it answers."""
        try:
            commands = self.core.handle(event)
        except Exception:
            # State is learnt again from the next heartbeats; a dead scheduler would learn nothing.
            log.exception("the core failed on %s", type(event).__name__)
            self.decided["core_error"] = self.decided.get("core_error", 0) + 1
            return
        if isinstance(event, m.DemandSeen):
            self._demand_seen.set()
            self._demand_seen = asyncio.Event()
        for command in commands:
            match command:
                case m.Send():
                    self._queue_for(command.node_id).put_nowait(command.command)
                case m.Publish():
                    self.table = command.table
                    self._table_changed.set()
                    self._table_changed = asyncio.Event()
                case m.ColdStart():
                    if wrong := mismatch(command):
                        log.error("%s", wrong)
                    self.on_cold_start(command)
                case m.Sketched():
                    self._sketches[command.model] = command.sketch
                    self._learned.set()
                case m.Quarantined():
                    self.spawn(self._keep_quarantine(command))
                case m.Learned():
                    self._unsaved[command.footprint.key] = command.footprint
                    self._learned.set()
                case m.Decided():
                    self.decided[command.action] = self.decided.get(command.action, 0) + 1
                    log.info(
                        "%s %s: %s", command.action, command.replica_id or command.model,
                        command.reason,
                        extra={"cause": command.cause or None, "node": command.node_id},
                    )  # fmt: skip

    async def routes_after(self, version: int, wait_s: float) -> RouteTable | None:
        """The table as soon as it is newer than `version`; None if it is not within `wait_s`."""
        deadline = self.now() + wait_s
        while self.leads and (self.table is None or self.table.version <= version):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline - self.now()):
                    await self._table_changed.wait()
                continue
            return None
        return self.table if self.leads else None

    async def routers_follow(self, limit_s: float = 2.0) -> None:
        """Return once every router that reports routes by the present table, or after `limit_s`.

        So that who was told "added" is not told "unknown model" by a router right after.
        """
        version = self.table.version if self.table else 0
        routers = self.core.state.routers
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while any(r.routes_version < version for r in routers.values()):
                    await self._demand_seen.wait()

    # ------------------------------------------------------------------------------- commands

    def agent_address(self, node_id: str) -> str | None:
        """The base URL of a node's agent, once it has reported."""
        node = self.core.state.nodes.get(node_id)
        return node.heartbeat.address if node and node.heartbeat else None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The session for calls to agents, made with the first one."""
        if self._http is None:
            headers = {"Authorization": f"Bearer {self.config.cluster_token}"}
            self._http = aiohttp.ClientSession(headers=headers, connector=tcp_connector())
        return self._http

    def _queue_for(self, node_id: str) -> asyncio.Queue[AgentCommand]:
        """Commands to one node are sent one after the other: a stop never overtakes its start."""
        if node_id not in self._senders:
            self._senders[node_id] = asyncio.Queue()
            self.spawn(self._send_to(node_id, self._senders[node_id]))
        return self._senders[node_id]

    async def _send_to(self, node_id: str, queue: asyncio.Queue[AgentCommand]) -> None:
        while True:
            command = await queue.get()
            done = await self._send(node_id, command)
            if self.leads:
                self.apply(done)

    async def _send(self, node_id: str, command: AgentCommand) -> m.CommandDone:
        kind = command.__struct_config__.tag
        assert isinstance(kind, str)
        replica_id = "" if isinstance(command, StageModels) else command.replica_id
        answer: CommandReply | None = None
        error = f"node {node_id} has not reported an address"
        address = self.agent_address(node_id)
        if address is not None:
            timeout = aiohttp.ClientTimeout(total=COMMAND_TIMEOUT_S)
            try:
                where, body = places.url(address, "agent", "commands"), msgspec.json.encode(command)
                async with self.http.post(where, data=body, timeout=timeout) as response:
                    body = await response.read()
                    if response.status == 200:
                        answer = decode(body, CommandReply)
                    else:
                        error = f"HTTP {response.status}: {body[:200].decode(errors='replace')}"
            except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
                error = f"{type(problem).__name__}: {problem}"
        if answer is None:
            log.warning("could not %s %s on %s: %s", kind, replica_id, node_id, error)
        return m.CommandDone(
            now=self.now(), node_id=node_id, replica_id=replica_id, kind=kind,
            delivered=answer is not None, ok=answer is not None and answer.ok,
            error=answer.error if answer else error,
            boot_id=answer.boot_id if answer else 0, seq=answer.seq if answer else 0,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- stored state

    async def store_model(self, stored: m.StoredModel) -> None:
        """Keep a model, then tell the core. Raises RegistryError."""
        key = self.store.key("models", stored.spec.name)
        await self.store.registry.put(key, msgspec.json.encode(stored))
        self.apply(m.ModelPut(now=self.now(), model=stored))

    async def remove_model(self, name: str) -> None:
        """Remove a model and all that is stored of it."""
        await self.store.registry.delete(self.store.key("models", name))
        await self.store.registry.delete(self.store.key("pins", name))
        await self.store.registry.delete(self.store.key("prewarm", name))
        await self.store.registry.delete(self.store.key("arrivals", name))
        self._asks.pop(name, None)
        footprints, _ = await self.store.registry.list(self.store.key("footprints", name) + "/")
        for entry in footprints:
            await self.store.registry.delete(entry.key)
        self.apply(m.ModelRemoved(now=self.now(), name=name))

    async def pin_model(self, name: str, pinned: bool) -> None:
        """Store that a model is kept running, or no longer."""
        if pinned:
            await self.store.registry.put(self.store.key("pins", name), b"true")
        else:
            await self.store.registry.delete(self.store.key("pins", name))
        self.apply(m.PinSet(now=self.now(), model=name, pinned=pinned))

    async def ask_prewarm(self, name: str, ask: Ask) -> None:
        """Keep an operator's wish beside those that are not over yet, and act on it."""
        asks = [a for a in self._asks.get(name, ()) if a.by + a.for_s > time.time()]
        asks.append(ask)
        await self.store.registry.put(self.store.key("prewarm", name), msgspec.json.encode(asks))
        self._asks[name] = tuple(asks)
        self.set_floors()

    def set_floors(self) -> None:
        """Tell the core which models may not be colder than what, as the clock stands now."""
        for name, floor in changed_floors(self.core.state.models, self._asks, time.time()):
            self.apply(m.FloorSet(now=self.now(), model=name, floor=floor))

    async def cordon_node(self, node_id: str, cordoned: bool, drain_s: float | None = None) -> None:
        """`drain_s`: what it runs moves off, or stops after so long."""
        flags = NodeFlags(cordoned=cordoned)
        await self.store.registry.put(self.store.key("nodes", node_id), msgspec.json.encode(flags))
        self.apply(
            m.CordonSet(
                now=self.now(), node_id=node_id, cordoned=cordoned, drain=drain_s is not None,
                deadline_s=drain_s or 0.0,
            )
        )  # fmt: skip

    async def _keep_quarantine(self, told: m.Quarantined) -> None:
        """So that the next leader knows it too; a registry that is down is told again."""
        key = self.store.key("quarantine", told.node_id, told.device_id)
        retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(RegistryError),
            wait=tenacity.wait_exponential(multiplier=0.2, max=5),
        )
        if told.reason is None:
            await retry(self.store.registry.delete, key)
        else:
            await retry(self.store.registry.put, key, told.reason.encode())

    async def keep_footprints(self) -> None:
        """Write what was learnt to the registry, at most once in SAVE_S, until cancelled."""
        while True:
            await self._learned.wait()
            self._learned.clear()
            unsaved, self._unsaved = self._unsaved, {}
            for key, footprint in unsaved.items():
                path = self.store.key("footprints", *key.path().split("/"))
                try:
                    if self.leads:
                        await self.store.registry.put(path, msgspec.json.encode(footprint))
                except RegistryError as error:
                    log.warning("the footprint of %s was not saved: %s", key.model, error)
            await self._keep_sketches()
            await asyncio.sleep(SAVE_S)

    async def _keep_sketches(self) -> None:
        unsaved, self._sketches = self._sketches, {}
        for name, sketch in unsaved.items():
            try:
                if self.leads and name in self.core.state.models:
                    await self.store.registry.put(
                        self.store.key("arrivals", name), msgspec.json.encode(sketch)
                    )
            except RegistryError as error:
                log.warning("when %s is called was not saved: %s", name, error)

    async def _elected(self, term: int) -> m.Elected:
        """Everything that is stored, for a new leader."""
        registry = self.store.registry
        entries, _ = await registry.list(self.store.key("models") + "/")
        models = []
        for entry in entries:
            try:
                models.append(decode(entry.value, m.StoredModel))
            except ValueError as error:
                log.error("stored model %s cannot be read and is left alone: %s", entry.key, error)
        kept, _ = await registry.list(self.store.key("footprints") + "/")
        nodes, _ = await registry.list(self.store.key("nodes") + "/")
        pins, _ = await registry.list(self.store.key("pins") + "/")
        wishes, _ = await registry.list(self.store.key("prewarm") + "/")
        sick, _ = await registry.list(self.store.key("quarantine") + "/")
        histories, _ = await registry.list(self.store.key("arrivals") + "/")
        self._asks = {e.key.rsplit("/", 1)[1]: decode(e.value, tuple[Ask, ...]) for e in wishes}
        agents, _ = await registry.services("stoker-agent")
        return m.Elected(
            now=self.now(),
            term=term,
            models=tuple(models),
            known_nodes=tuple(agent.meta.get("node_id", agent.service_id) for agent in agents),
            cordoned=tuple(
                e.key.rsplit("/", 1)[1] for e in nodes if decode(e.value, NodeFlags).cordoned
            ),
            footprints=tuple(_readable(kept)),
            quarantined=tuple(map(_quarantined, sick)),
            sketches=dict(_sketches(histories)),
            rules=await self.rules.load(),
            wall_s=time.time(),
            pinned=tuple(e.key.rsplit("/", 1)[1] for e in pins),
        )

    # ------------------------------------------------------------------------------- leading

    async def hear_epoch(self, epoch: int) -> None:
        """An agent has obeyed a later leader, so it would refuse this one forever.

        That leader's registry may be lost: then the next term has to be higher than it.
        """
        if not self.leads or epoch <= self.core.state.term or self._outranked:
            return
        self._outranked = True
        log.warning(
            "an agent knows term %d, this leader's is %d: leading again with a higher one",
            epoch, self.core.state.term,
        )  # fmt: skip
        entry = await self.store.registry.get(self.store.key("term"))
        if entry is None or int(entry.value) < epoch:
            version = entry.version if entry else 0
            await self.store.registry.put(self.store.key("term"), str(epoch).encode(), version)

    async def lead_or_stand_by(self) -> None:
        """Take the lock, lead until it is lost, and try again, until cancelled."""
        while True:
            try:
                lock = await self._campaign()
                if lock is None:
                    await asyncio.sleep(0.5)
                    continue
                await self._lead(lock)
            except RegistryError as error:
                self.why_not_leading = f"the registry does not answer: {error}"
                log.warning(self.why_not_leading)
                await asyncio.sleep(1.0)

    async def _campaign(self) -> Lock | None:
        entry = await self.store.registry.get(self.store.key("term"))
        term = int(entry.value) + 1 if entry else 1
        holder = msgspec.json.encode({"url": self.url, "term": term})
        lock = await self.store.registry.acquire(self.store.key("leader"), holder, LEADER_TTL_S)
        if lock is None:
            return None
        version = entry.version if entry else 0
        if not await self.store.registry.put(self.store.key("term"), str(term).encode(), version):
            await lock.release()  # another led in between: its term is newer
            return None
        event = await self._elected(term)
        await self.access.load()
        log.info("leading", extra={"term": term, "models": len(event.models)})
        self.leads, self.why_not_leading = True, ""
        self.apply(event)
        return lock

    async def _lead(self, lock: Lock) -> None:
        renewed_at = self.now()
        try:
            while lock.held and not self._outranked:
                await asyncio.sleep(m.TICK_S)
                self.apply(m.Tick(now=self.now()))
                self.set_floors()
                if self.now() - renewed_at >= LEADER_TTL_S / 3:
                    renewed_at = await self._renew(lock, renewed_at)
            log.warning("the leader lock is lost or given up: standing by")
        finally:
            self.leads = self._outranked = False
            self.access.wake()
            self._table_changed.set()  # routers that wait here must find the new leader
            self._table_changed = asyncio.Event()
            for sender in self._senders.values():
                while not sender.empty():
                    sender.get_nowait()
            with contextlib.suppress(RegistryError):
                await lock.release()

    async def _renew(self, lock: Lock, renewed_at: float) -> float:
        """When it was last renewed. A registry that is down for less than the ttl costs nothing."""
        try:
            async with asyncio.timeout(LEADER_TTL_S / 3):
                await lock.renew()
        except (RegistryError, TimeoutError) as error:
            if self.now() - renewed_at > LEADER_TTL_S:
                raise RegistryError(f"the leader lock could not be renewed: {error}") from error
            return renewed_at
        return self.now()

    # ------------------------------------------------------------------------------- life

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until it ends or the driver closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End the driver's tasks and its session."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
