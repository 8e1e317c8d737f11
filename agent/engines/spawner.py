"""Gives a planned start its process: forked from the launcher where that can be, else spawned.

Rules this file keeps: a start that can't be forked is spawned, and says why.
"""

from __future__ import annotations

import logging
from pathlib import Path

from msgspec import Struct

from agent.engines.launcher import CannotFork, HeldProcess, Launcher
from agent.engines.process import MainProcess
from agent.engines.supervisor import Supervisor
from runtime.engine.contract import Launch

log = logging.getLogger("stoker.agent")


class Spawned(Struct, frozen=True):
    """A process that runs; `why_plain` is one word for metrics, "" where it was forked."""

    leader: MainProcess
    why_plain: str = ""

    @property
    def how(self) -> str:
        """For metrics: forked or plain."""
        return "plain" if self.why_plain else "forked"


class Spawner:
    """The processes of one node's starts."""

    def __init__(
        self, supervisor: Supervisor, launcher: Launcher, cwd: Path, *, forks: bool
    ) -> None:
        """`cwd`: of spawned engines; `forks`: whether the launcher may be used at all."""
        self._supervisor = supervisor
        self._launcher = launcher
        self._cwd = cwd
        self._forks = forks

    async def start(self, replica_id: str, launch: Launch) -> Spawned:
        """Start an engine; nothing is waited for once its process runs.

        Raises OSError if the program can't be run, or the forked process is dead already.
        """
        held, why_plain = await self._fork(replica_id, launch)
        if held:
            return Spawned(self._supervisor.release(replica_id, held))
        leader = self._supervisor.spawn(replica_id, launch.argv, launch.env, self._cwd)
        return Spawned(leader, why_plain)

    async def _fork(self, replica_id: str, launch: Launch) -> tuple[HeldProcess | None, str]:
        """(a process that waits to be released, ""), or (None, why its start must be plain)."""
        if launch.preload is None:
            return None, "engine"
        if not self._forks:
            return None, "off"
        env = self._supervisor.environment(replica_id, launch.env)
        try:
            with self._supervisor.open_log(replica_id) as output:
                return await self._launcher.fork(launch, env, output.fileno()), ""
        except CannotFork as error:
            log.warning("%s is started plainly: %s", replica_id, error)
            return None, error.why
