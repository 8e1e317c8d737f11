"""Carries out what the core decides on one node, and turns what happens there into its events.

Rules this file keeps:
- the core is only touched in the event loop's thread, through `apply`;
- nothing slow runs there: reading devices, scanning /proc and resolving a source are threads';
- an error of a start becomes an exit with words, never an exception of the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil

from agent.cache.model_cache import ModelCache
from agent.core import messages
from agent.core.replica import SERVED_PHASES, SLEEP_PHASES, Replica
from agent.core.state_machine import AgentCore
from agent.devices.device_watch import DeviceWatch
from agent.devices.host_watch import HostWatch
from agent.devices.inventory import DeviceSource
from agent.devices.preemption import Preemption
from agent.engines import process
from agent.engines.launch_plan import BadStart, Place, make_plan
from agent.engines.launcher import CannotFork, HeldProcess, Launcher
from agent.engines.ports import NoFreePort, Ports
from agent.engines.probe import Prober, Target, is_healthy
from agent.engines.process import Owner
from agent.engines.reported_load import EngineLoad
from agent.engines.sleep import Controls, is_sleeping
from agent.engines.sleep_tasks import Rungs, levels, residue_bytes
from agent.engines.supervisor import Supervisor
from agent.engines.wake_canary import WakeCanary
from agent.metrics import Metrics
from agent.records import Record, Records
from agent.rung_limits import Limits
from agent.weights.adapters import Adapters
from agent.weights.disk_models import DiskModels
from agent.weights.load_format_policy import Known
from agent.weights.staging import Stager
from agent.weights.start_source import Origins
from runtime import places
from runtime.contract import engine_policy
from runtime.contract.config import Config
from runtime.engine import toolchain
from runtime.engine.contract import Launch
from runtime.engine.select import get_engine
from runtime.wire.agent_messages import Heartbeat, ReplicaPhase, ReplicaReport
from runtime.wire.names import REPLICA_ID

log = logging.getLogger("stoker.agent")

_WILDCARDS = {"0.0.0.0", "::"}


class Node:
    """One node's replicas, devices and records."""

    def __init__(
        self,
        config: Config,
        session: aiohttp.ClientSession,
        devices: DeviceSource,
        records: Records,
        cache: ModelCache,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a heartbeat should be sent at once."""
        self.config = config
        self.cache = cache
        self.state_dir = Path(config.state_dir).absolute()
        self.place = Place(
            host=config.agent.host,
            device_kind=devices.kind,
            python=config.agent.engine_python or sys.executable,
            cache_dir=str(self.state_dir / "cache"),
            engine_env=config.agent.engine_env,
            media_domains=config.agent.media_domains,
        )
        self.metrics = Metrics()
        self.finished = asyncio.Event()  # shut down, and no replica is left
        # Gets the error of a task that must not fail: the agent then ends with it.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.address = ""
        self.engines: dict[str, str] = {}
        self.core = AgentCore(
            start_timeout_s=config.agent.start_timeout_s,
            max_restarts=config.agent.max_restarts,
            epoch=records.epoch,
            rungs=lambda spec: levels(spec, devices.kind),
            disabled=records.disabled(),
            barred=lambda spec: self._limits.barred(spec),
        )
        self._session = session
        self._records = records
        self._changed = changed
        engine_env = config.agent.engine_env
        self._supervisor = Supervisor(
            Owner(config.node_id(), str(self.state_dir)),
            self.state_dir / "logs",
            self._on_exit,
            engine_env,
        )
        base = process.base_environment(os.environ, engine_env)
        self._launcher = Launcher(self.state_dir / "logs", base, self.state_dir)
        if lost := engine_policy.dropped(os.environ, engine_env):
            log.warning(
                "in this agent's environment, but not for engines: %s; see agent.engine_env, and"
                " `env` of a model's spec",
                ", ".join(lost),
            )
        self.devices = DeviceWatch(devices, self._supervisor.live_pids)
        own = (config.router.port, config.scheduler.port, config.agent.port)
        self._ports = Ports(config.agent.engine_port_range(), never=own)
        self._known: dict[str, Record] = {}
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._reaps: dict[str, asyncio.Task[None]] = {}
        self._probes: dict[str, tuple[Prober, asyncio.Task[None]]] = {}
        self._rungs = Rungs(self, session, self.devices, self.metrics, self._task)
        self.host = HostWatch(config.agent, devices.kind, self._launcher.pids)
        self.preemption = Preemption(config.agent, session, changed)
        self.on_disk = DiskModels(cache)
        self.stager = Stager(cache, self.on_disk, self.metrics, self.devices.pids, self._loading)
        self._origins = Origins(
            config,
            self.place,
            cache,
            self.on_disk,
            records.load_formats(),
            self._save_load_formats,
            self.metrics,
        )
        self._limits = Limits(self.host, self.devices, self.on_disk, self.place, self.metrics)
        self.adapters = Adapters(cache, self.state_dir / "adapters", self._engines, self._task)
        self._sharing: set[asyncio.Task[None]] = set()
        self._seq = 0
        self._version = importlib.metadata.version("stoker-serve")

    @property
    def boot_id(self) -> int:
        """Grows with every start of the agent."""
        return self._records.boot_id

    @property
    def next_seq(self) -> int:
        """Of the heartbeat that will be built next."""
        return self._seq + 1

    # ------------------------------------------------------------------ the core's hands

    def apply(self, event: messages.Event) -> messages.Refused | None:
        """Give the core an event and do what it says; a command may be refused."""
        refused = None
        if isinstance(event, messages.PhasesSeen):
            self._started(event)
        for effect in self.core.handle(event):
            if isinstance(effect, messages.Refused):
                refused = effect
            else:
                self._execute(effect)
        if self.core.finished:
            self.finished.set()
        return refused

    def _started(self, event: messages.PhasesSeen) -> None:
        tail = functools.partial(self._supervisor.log_tail, event.replica_id)
        weights_s = event.phases.get("weights")
        ready = self._task(self._origins.ready(event.replica_id, weights_s, tail))
        self._sharing.add(ready)
        ready.add_done_callback(self._sharing.discard)

    def _execute(self, effect: messages.Effect) -> None:
        match effect:
            case messages.Spawn(replica_id):
                self.adapters.begin(self.core.replicas[replica_id].command.spec)
                self._starts[replica_id] = self._task(self._start(replica_id))
            case messages.Signal(replica_id, "TERM"):
                self._supervisor.terminate(replica_id)
            case messages.Signal(replica_id):
                if replica_id not in self._reaps:
                    self._reaps[replica_id] = self._task(self._reap(replica_id))
            case messages.SleepEngine() | messages.WakeEngine():
                self._rungs.carry_out(effect)
            case messages.Stage(models):
                self.stager.wish(models)
            case messages.SaveDisabled():
                with _logged("the disabled rungs"):
                    self._records.save_disabled(self.core.disabled)
            case messages.SaveRecord(replica_id):
                self._save(replica_id)
                if probe := self._probes.get(replica_id):
                    probe[0].poke()
            case messages.ForgetRecord(replica_id):
                self.cache.release(replica_id)
                self._origins.forget(replica_id)
                self._ports.give_back(replica_id)
                if record := self._known.pop(replica_id, None):
                    self._end_adapters(record.saved.command.spec.name)
                with _logged(f"the record of {replica_id}"):
                    self._records.forget(replica_id)
            case messages.SaveEpoch(epoch):
                with _logged("the scheduler's epoch"):
                    self._records.save_epoch(epoch)
            case messages.SendHeartbeatNow():
                self._changed()

    def _end_adapters(self, model: str) -> None:
        if all(r.command.spec.name != model for r in self.core.replicas.values()):
            self.adapters.end(model)

    def _engines(self, model: str) -> list[Controls]:
        """The control routes of its replicas that serve."""
        ready = [
            i
            for i, r in self.core.replicas.items()
            if r.command.spec.name == model and r.phase == "ready" and i in self._known
        ]
        targets = map(self.target, ready)
        return [Controls(self._session, t.base_url, t.control_key) for t in targets]

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.failed.done():
            self.failed.set_exception(error)

    def _save_load_formats(self, known: dict[str, Known]) -> None:
        with _logged("the load formats"):
            self._records.save_load_formats(known)

    def _save(self, replica_id: str, **fields: object) -> None:
        if replica_id not in self.core.replicas:
            return
        saved = self.core.saved(replica_id)
        known = self._known.get(replica_id) or Record(saved=saved)
        record = msgspec.structs.replace(known, saved=saved, **fields)
        self._known[replica_id] = record
        with _logged(f"the record of {replica_id}"):
            self._records.save(record)

    # ------------------------------------------------------------------ start

    async def _start(self, replica_id: str) -> None:
        command = self.core.replicas[replica_id].command
        log_file = self._supervisor.log_path(replica_id)
        position = log_file.stat().st_size if log_file.exists() else 0
        try:
            devices = [d for d in self.devices.last() if d.device_id in command.device_ids]
            origin = await self._origins.find(
                replica_id,
                command.spec,
                devices[0] if devices else None,
                self.engines.get(command.spec.engine),
            )
            plan = await asyncio.to_thread(
                make_plan,
                command,
                self.devices.last(),
                self.place,
                self._ports.take(replica_id, self.place.host),
                origin.model_path,
                origin.load_format,
                self.adapters.index(command.spec),
            )
            held, why = await self._fork(replica_id, plan.launch)
            # No await from here on: a stop must find either no process or a recorded one.
            if held:
                leader = self._supervisor.release(replica_id, held)
            else:
                leader = self._supervisor.spawn(
                    replica_id, plan.launch.argv, plan.launch.env, self.state_dir
                )
        except BadStart as error:
            self._exited(replica_id, error.kind, str(error))
            return
        except NoFreePort as error:
            self._exited(replica_id, "port_in_use", str(error))
            return
        except OSError as error:
            self._exited(replica_id, "crash", f"its engine could not be started: {error}")
            return
        self._save(
            replica_id,
            port=plan.context.port,
            health_path=plan.launch.health_path,
            route_key=plan.context.route_key,
            control_key=plan.context.control_key,
            leader=leader,
            canary=None,
            started_from=origin.rung,
            engine_version=self.engines.get(command.spec.engine),
        )
        how = "forked" if held else "plain"
        self.metrics.starts.labels(command.spec.name, how, why).inc()
        log.info(
            "%s started (%s, from %s): %s",
            replica_id,
            how,
            origin.rung,
            command.reason,
            extra={"model": command.spec.name, "pid": leader.pid, "port": plan.context.port},
        )
        self._probe(replica_id)
        self._rungs.started(replica_id, log_file, position, time.monotonic(), origin.phases)
        self._changed()

    def _loading(self) -> set[str]:
        """The sources that engines read right now, or may."""
        reads = ("starting", "backoff", "waking")
        replicas = self.core.replicas.values()
        return {r.command.spec.source for r in replicas if r.phase in reads}

    async def _fork(self, replica_id: str, launch: Launch) -> tuple[HeldProcess | None, str]:
        """(a process that waits to be let go, ""), or (None, why its start must be plain)."""
        if launch.preload is None:
            return None, "engine"
        if not self.config.agent.launcher:
            return None, "off"
        env = self._supervisor.environment(replica_id, launch.env)
        try:
            with self._supervisor.open_log(replica_id) as output:
                return await self._launcher.fork(launch, env, output.fileno()), ""
        except CannotFork as error:
            log.warning("%s is started plainly: %s", replica_id, error)
            return None, error.why

    # ------------------------------------------------------------------ probes

    def _probe(self, replica_id: str) -> None:
        prober = Prober(
            self._session, self.target(replica_id), lambda: self._phase(replica_id), self._heard
        )
        self._probes[replica_id] = (prober, self._task(prober.run()))

    def _heard(self, event: messages.HealthChanged | messages.StatusSeen) -> None:
        was = self._phase(event.replica_id)
        self.apply(event)
        if was == "starting" and self._phase(event.replica_id) == "ready":
            replica = self.core.replicas[event.replica_id]
            start_s = replica.start_s or 0.0
            self.metrics.start_s.labels(replica.command.spec.name).observe(start_s)
            log.info("%s is ready after %.2f s", event.replica_id, start_s)

    def _phase(self, replica_id: str) -> ReplicaPhase | None:
        replica = self.core.replicas.get(replica_id)
        return replica.phase if replica else None

    def replica(self, replica_id: str) -> Replica | None:
        """What the core knows of it; None once it is forgotten."""
        return self.core.replicas.get(replica_id)

    def canary(self, replica_id: str) -> WakeCanary | None:
        """What its canary has to answer; None if it was not asked yet."""
        record = self._known.get(replica_id)
        return record.canary if record else None

    def keep_canary(self, replica_id: str, canary: WakeCanary) -> None:
        """Remember that, across restarts of the agent too."""
        self._save(replica_id, canary=canary)

    def target(self, replica_id: str) -> Target:
        """Where its engine is reached."""
        record = self._known[replica_id]
        host = self.config.agent.host
        return Target(
            replica_id=replica_id,
            base_url=places.base_url("127.0.0.1" if host in _WILDCARDS else host, record.port),
            health_path=record.health_path,
            control_key=record.control_key,
        )

    def _end_probe(self, replica_id: str) -> None:
        if probe := self._probes.pop(replica_id, None):
            probe[1].cancel()

    # ------------------------------------------------------------------ exit and end

    def _on_exit(self, replica_id: str, returncode: int | None) -> None:
        self._end_probe(replica_id)
        replica = self.core.replicas.get(replica_id)
        if replica is None:
            return
        engine = get_engine(replica.command.spec.engine)
        try:
            kind, words = engine.explain_exit(returncode, self._supervisor.log_tail(replica_id))
        except Exception:  # an engine's fault must not hide that it died
            log.exception("%s: its exit can't be explained", replica_id)
            kind, words = "crash", f"it ended with status {returncode}; see its log"
        self._exited(replica_id, kind, words)

    def _exited(self, replica_id: str, kind: str, words: str) -> None:
        replica = self.core.replicas[replica_id]
        if replica.phase == "starting" and self._origins.failed(replica_id, words):
            kind = "crash"  # it is worth another start, with another load format
        if replica.phase == "starting" or replica.phase in SERVED_PHASES:
            self.metrics.exits.labels(replica.command.spec.name, kind).inc()
            log.warning("%s died while %s: %s", replica_id, replica.phase, words)
        now = time.monotonic()
        self.apply(messages.ProcessExited(now=now, replica_id=replica_id, kind=kind, words=words))

    async def _reap(self, replica_id: str) -> None:
        """Kill what there is, see it dead and its device memory free, then say Gone."""
        if start := self._starts.pop(replica_id, None):
            start.cancel()  # unless it has spawned by now, it never will
            await asyncio.wait([start])
        await self._rungs.end(replica_id)
        self.devices.dying(replica_id)
        await self._supervisor.kill_tree(replica_id)
        self._end_probe(replica_id)
        await self.devices.wait_free(replica_id)
        self._supervisor.forget(replica_id)
        self._ports.give_back(replica_id)
        del self._reaps[replica_id]
        self._save(replica_id, leader=None)
        self.apply(messages.Gone(now=time.monotonic(), replica_id=replica_id))

    # ------------------------------------------------------------------ views

    def heartbeat(self) -> Heartbeat:
        """The node's whole truth now. Reads nothing that can block."""
        self._seq += 1
        memory = psutil.virtual_memory()
        return Heartbeat(
            node_id=self.config.node_id(),
            boot_id=self.boot_id,
            seq=self._seq,
            address=self.address,
            devices=self.devices.last(),
            replicas=tuple(self._report(r) for r in self.core.reports(time.monotonic())),
            host_memory_total_bytes=memory.total,
            host_memory_available_bytes=memory.available,
            host_budget_bytes=self.host.budget_bytes(self.devices.last(), self._awake_bytes()),
            cached=self.on_disk.cached(),
            staged=self.stager.staged(),
            preemptible=self.preemption.preemptible,
            preempted_in_s=self.preemption.left_s(),
            engines=dict(self.engines),
            labels=self.config.agent.labels,
            draining=self.core.shutting_down,
            version=self._version,
            epoch=self.core.epoch,
        )

    def _awake_bytes(self) -> int:
        """Host memory of the engines that do not sleep: a sleeper's is booked."""
        awake = (i for i, r in self.core.replicas.items() if r.phase not in SLEEP_PHASES)
        return sum(map(self.devices.host_bytes, awake))

    def _report(self, report: ReplicaReport) -> ReplicaReport:
        record = self._known.get(report.replica_id)
        runs = report.phase in ("starting", "stopping") or report.phase in SERVED_PHASES
        if record is None or record.leader is None or not runs:
            return report
        probe = self._probes.get(report.replica_id)
        load = probe[0].load if probe else EngineLoad()
        return msgspec.structs.replace(
            report,
            base_url=places.base_url(advertised_host(self.config), record.port),
            key=record.route_key,
            pid=record.leader.pid,
            memory_used_bytes=self.devices.used_bytes(report.replica_id),
            host_bytes=self._rungs.host_bytes(report, record.saved.command.spec),
            engine_version=record.engine_version,
            started_from=record.started_from,
            kv_cache_usage=load.kv_cache_usage if report.phase == "ready" else None,
            engine_waiting=load.waiting if report.phase == "ready" else None,
        )

    def log_path(self, replica_id: str) -> Path | None:
        """The log of a replica, also of one that ended lately; None if there is none. It may not
        be written yet."""
        if not REPLICA_ID.fullmatch(replica_id):
            return None
        path = self._supervisor.log_path(replica_id)
        return path if self.runs(replica_id) or path.exists() else None

    def runs(self, replica_id: str) -> bool:
        """Whether more may be written to its log."""
        return replica_id in self.core.replicas

    # ------------------------------------------------------------------ the agent's own life

    async def adopt(self) -> None:
        """Take over what an earlier agent left: recorded replicas; what is unknown is killed."""
        records = {r.saved.command.replica_id: r for r in self._records.load()}
        trees = await self._supervisor.trees()
        for replica_id in trees.keys() - records.keys():
            log.warning("%s: no record of it, so its processes are killed", replica_id)
            await self._supervisor.kill_tree(replica_id)
        self._known.update(records)
        for replica_id, record in records.items():
            if record.leader:  # dead or alive: what is left of it may listen there
                self._ports.keep(replica_id, record.port)
        alive = {
            replica_id
            for replica_id, r in records.items()
            if r.leader and self._supervisor.adopt(replica_id, r.leader)
        }
        healthy = dict(
            zip(
                alive,
                await asyncio.gather(*(is_healthy(self._session, self.target(r)) for r in alive)),
                strict=True,
            )
        )
        sleeping = await self._ask_sleepers([r for r in alive if healthy[r]])
        # Those that start first: the core gives a device to whoever is adopted before them.
        for replica_id in sorted(
            records, key=lambda r: (r not in alive, records[r].saved.phase != "starting")
        ):
            self._adopt(
                records[replica_id],
                replica_id in alive,
                healthy.get(replica_id, False),
                sleeping.get(replica_id),
            )

    async def _ask_sleepers(self, alive: list[str]) -> dict[str, bool | None]:
        """What each engine that was asleep, or nearly so, says of itself."""
        asked = [r for r in alive if self._known[r].saved.phase in SLEEP_PHASES]
        if asked:
            await self.devices.read()
        targets = map(self.target, asked)
        controls = (Controls(self._session, t.base_url, t.control_key) for t in targets)
        answers = await asyncio.gather(*map(is_sleeping, controls))
        return dict(zip(asked, answers, strict=True))

    def _adopt(self, record: Record, alive: bool, healthy: bool, sleeping: bool | None) -> None:
        replica_id = record.saved.command.replica_id
        saved = record.saved
        if record.leader is None and saved.phase == "starting":
            saved = msgspec.structs.replace(saved, phase="backoff")  # it never ran: no crash
        log.info("%s adopted", replica_id, extra={"alive": alive, "healthy": healthy})
        self.cache.hold(saved.command.spec.source, replica_id)
        self.on_disk.name(saved.command.spec.source)
        self.adapters.begin(saved.command.spec, adopted=True)
        residue = 0
        if saved.sleep:
            held = self.devices.used_bytes(replica_id) or 0
            residue = residue_bytes(saved.command, saved.sleep.level, held)
        self.apply(
            messages.Adopted(
                now=time.monotonic(),
                saved=saved,
                alive=alive,
                healthy=healthy,
                age_s=process.age_s(record.leader) if alive and record.leader else 0.0,
                sleeping=sleeping,
                residue_bytes=residue,
            )
        )
        if alive:
            self._probe(replica_id)

    async def find_engines(self) -> None:
        """Learn which engines this node can run."""
        for name in ("vllm", "stub"):
            try:
                version = await asyncio.to_thread(get_engine(name).version, self.place.python)
            except Exception:  # an engine's fault must not end the agent
                log.exception("the version of %s can't be told", name)
                continue
            if version:
                self.engines[name] = version
                self._prepare(name)
        if "vllm" in self.engines and self.place.device_kind != "simulated":
            path = os.environ.get("PATH")
            if lacks := await asyncio.to_thread(toolchain.missing, self.place.python, path):
                log.warning("%s", lacks)
        self._changed()
        await asyncio.gather(self._origins.find_formats(), self._limits.find())

    def _prepare(self, engine: str) -> None:
        place = self.place
        preload = get_engine(engine).preload(place.python, place.cache_dir, place.device_kind)
        if preload and self.config.agent.launcher:
            self._launcher.prepare(preload)

    async def keep_launcher(self) -> None:
        """Give its memory back while the host is short of it."""
        self._launcher.keep(psutil.virtual_memory().available)
        await self.host.read()
        self.metrics.launchers.set(self._launcher.ready)
        self.metrics.launcher_bytes.set(self.host.launcher_bytes)
        budget = self.host.budget_bytes(self.devices.last(), self._awake_bytes())
        self.metrics.host_budget_bytes.set(budget)

    async def rotate_logs(self) -> None:
        """Keep the logs within their limit."""
        await asyncio.to_thread(self._supervisor.rotate_logs)

    async def close(self) -> None:
        """Let go of every engine, dead or alive."""
        tasks = [*self._starts.values(), *self._reaps.values()]
        tasks += [*self._sharing, *(task for _, task in self._probes.values()), *self._rungs.all()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.stager.close()
        await self.adapters.close()
        await self._launcher.close()
        self._supervisor.close()


def advertised_host(config: Config) -> str:
    """The host name or address that others reach this node by."""
    return config.agent.advertise_host or config.agent.host


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """A disk that is full must not end the agent; what that costs is said."""
    try:
        yield
    except OSError as error:
        log.error("%s can't be written: %s; an agent started later will not know it", what, error)
