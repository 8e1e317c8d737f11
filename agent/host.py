"""The host's side of a node: its devices, memory, disk and processes, whatever runs on it.

Rules this file keeps: it knows no replica; an engine's fault never ends the agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp

from agent.cache.model_cache import ModelCache
from agent.devices.device_watch import DeviceWatch
from agent.devices.host_watch import HostWatch
from agent.devices.inventory import DeviceSource
from agent.devices.preemption import Preemption
from agent.engines import process
from agent.engines.launch_plan import Place
from agent.engines.launcher import Launcher
from agent.engines.ports import Ports
from agent.engines.process import Owner
from agent.engines.spawner import Spawner
from agent.engines.supervisor import OnExit, Supervisor
from agent.metrics import Metrics
from agent.records import Records
from agent.rung_limits import RungLimits
from agent.tasks import Tasks
from agent.weights.disk_models import DiskModels
from agent.weights.start_source import StartSources
from runtime.contract import engine_policy
from runtime.contract.config import Config
from runtime.engine import toolchain
from runtime.engine.select import get_engine

log = logging.getLogger("stoker.agent")

_ENGINES = ("vllm", "stub")


class Host:
    """One host, as its agent sees it."""

    def __init__(
        self,
        config: Config,
        session: aiohttp.ClientSession,
        devices: DeviceSource,
        records: Records,
        cache: ModelCache,
        on_exit: OnExit,
        changed: Callable[[], None],
    ) -> None:
        """`on_exit`: as in Supervisor; `changed` is called when a heartbeat should be sent at once.

        Raises ValueError for settings that this host can't have.
        """
        self.state_dir = Path(config.state_dir).absolute()
        self.cache = cache
        self.metrics = Metrics()
        self.tasks = Tasks()
        self.place = _place(config, self.state_dir, devices)
        self.versions: dict[str, str] = {}  # of each engine found so far
        self.supervisor, self.launcher = _processes(config, self.state_dir, on_exit)
        self.spawner = Spawner(
            self.supervisor, self.launcher, self.state_dir, forks=config.agent.launcher
        )
        own = (config.router.port, config.scheduler.port, config.agent.port)
        self.ports = Ports(config.agent.engine_port_range(), never=own)
        self.devices = DeviceWatch(devices, self.supervisor.live_pids)
        self.memory = HostWatch(config.agent, devices.kind, self.launcher.pids)
        self.preemption = Preemption(config.agent, session, changed)
        self.on_disk = DiskModels(cache)
        self.limits = RungLimits(self.memory, self.devices, self.on_disk, self.place, self.metrics)
        self.sources = StartSources(
            config,
            self.place,
            cache,
            self.on_disk,
            records.load_formats(),
            records.save_load_formats,
            self.metrics,
        )
        self._forks = config.agent.launcher
        self._changed = changed

    async def find_engines(self) -> None:
        """Learn which engines this host can run, and with what."""
        for name in _ENGINES:
            try:
                version = await asyncio.to_thread(get_engine(name).version, self.place.python)
            except Exception:  # an engine's fault must not end the agent
                log.exception("the version of %s can't be told", name)
                continue
            if version:
                self.versions[name] = version
                self._prepare(name)
        if "vllm" in self.versions and self.place.device_kind != "simulated":
            path = os.environ.get("PATH")
            if lacks := await asyncio.to_thread(toolchain.missing, self.place.python, path):
                log.warning("%s", lacks)
        self._changed()
        await asyncio.gather(self.sources.find_formats(), self.limits.find())

    def _prepare(self, engine: str) -> None:
        """Have a parent that its starts are forked from."""
        place = self.place
        preload = get_engine(engine).preload(place.python, place.cache_dir, place.device_kind)
        if preload and self._forks:
            self.launcher.prepare(preload)


def _place(config: Config, state_dir: Path, devices: DeviceSource) -> Place:
    return Place(
        host=config.agent.host,
        device_kind=devices.kind,
        python=config.agent.engine_python or sys.executable,
        cache_dir=str(state_dir / "cache"),
        engine_env=config.agent.engine_env,
        media_domains=config.agent.media_domains,
    )


def _processes(config: Config, state_dir: Path, on_exit: OnExit) -> tuple[Supervisor, Launcher]:
    engine_env = config.agent.engine_env
    if lost := engine_policy.dropped(os.environ, engine_env):
        log.warning(
            "in this agent's environment, but not for engines: %s; see agent.engine_env, and"
            " `env` of a model's spec",
            ", ".join(lost),
        )
    owner = Owner(config.node_id(), str(state_dir))
    supervisor = Supervisor(owner, state_dir / "logs", on_exit, engine_env)
    base = process.base_environment(os.environ, engine_env)
    return supervisor, Launcher(state_dir / "logs", base, state_dir)
