"""Engine processes: start, watch, signal, kill, and their logs.

Rules this file keeps:
- a replica owns a whole process tree: killing it means that a scan finds nothing any more;
- an engine outlives the agent, so its exit is watched through a pidfd, child of ours or not;
- a child gets a clean environment, no stdin, and no file of the agent's but its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from agent.engines import process
from agent.engines.launcher import HeldProcess
from agent.engines.process import Cgroups, MainProcess, Owner
from runtime import places
from runtime.contract.engine_policy import ENGINE_ENV

log = logging.getLogger("stoker.agent")

LOG_LIMIT_BYTES = 20 * 2**20
KEPT_LOGS = 50  # of replicas that ended
_TAIL_BYTES = 64 * 1024
_KILL_POLL_S = 0.02
_KILL_WARN_S = 30.0
_STATUS_TIMEOUT_S = 2.0  # for the launcher to say how an engine ended

OnExit = Callable[[str, int | None], None]


class _Engine:
    """One watched main process."""

    def __init__(
        self,
        leader: MainProcess,
        popen: subprocess.Popen[bytes] | None,
        pidfd: int,
        held: HeldProcess | None = None,
    ) -> None:
        self.leader = leader
        self.popen = popen
        self.held = held
        self.pidfd = pidfd
        self.exited = asyncio.Event()


class Supervisor:
    """Every engine process of one node. All methods are for the event loop's thread."""

    def __init__(
        self, owner: Owner, logs: Path, on_exit: OnExit, engine_env: Sequence[str] = ENGINE_ENV
    ) -> None:
        """`on_exit(replica_id, returncode)` is called once for each main process that ended; the
        code is None for an adopted one, which only its parent could ask."""
        self._owner = owner
        self._logs = logs
        self._on_exit = on_exit
        self._engine_env = engine_env
        self._engines: dict[str, _Engine] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._cgroups = _open_cgroups(owner)
        logs.mkdir(parents=True, exist_ok=True)

    def pid(self, replica_id: str) -> int | None:
        """The main process, dead or alive; None where there never was one."""
        engine = self._engines.get(replica_id)
        return engine.leader.pid if engine else None

    # ------------------------------------------------------------------ start and watch

    def spawn(
        self, replica_id: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path
    ) -> MainProcess:
        """Start an engine. Raises OSError if the program can't be run."""
        environment = self.environment(replica_id, env)
        with self.open_log(replica_id) as output:
            popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        self._cgroups.add(replica_id, popen.pid)
        # A child that died already is a zombie until it is asked for: its pid can't be reused yet.
        leader = MainProcess(popen.pid, process.start_ticks(popen.pid) or 0)
        self._watch(replica_id, leader, popen)
        return leader

    def environment(self, replica_id: str, env: Mapping[str, str]) -> dict[str, str]:
        """All that an engine gets to see, `env` and the replica's marks with it."""
        base = process.base_environment(os.environ, self._engine_env)
        return {**base, **env, **self._owner.marks(replica_id)}

    def open_log(self, replica_id: str) -> BinaryIO:
        """The replica's log, at a new start's head."""
        output = self.log_path(replica_id).open("ab")
        output.write(_log_head(replica_id))
        output.flush()
        return output

    def release(self, replica_id: str, held: HeldProcess) -> MainProcess:
        """Let a forked engine run, and watch it. Raises OSError if it is dead already."""
        self._cgroups.add(replica_id, held.pid)
        leader = MainProcess(held.pid, process.start_ticks(held.pid) or 0)
        try:
            self._watch(replica_id, leader, None, held)
        except OSError:
            held.drop()
            raise
        held.release()
        return leader

    def adopt(self, replica_id: str, leader: MainProcess) -> bool:
        """Take over an engine that an earlier agent started; False if its main process is dead,
        then only what it left behind is ours to kill."""
        try:
            engine = self._watch(replica_id, leader, None)
        except ProcessLookupError:
            engine = self._engines[replica_id] = _Engine(leader, None, -1)
        if process.start_ticks(leader.pid) == leader.start:
            return True
        self._unwatch(engine)
        engine.exited.set()
        return False

    def _watch(
        self,
        replica_id: str,
        leader: MainProcess,
        popen: subprocess.Popen[bytes] | None,
        held: HeldProcess | None = None,
    ) -> _Engine:
        engine = _Engine(leader, popen, os.pidfd_open(leader.pid), held)
        self._engines[replica_id] = engine
        asyncio.get_running_loop().add_reader(engine.pidfd, self._ended, replica_id, engine)
        return engine

    def _ended(self, replica_id: str, engine: _Engine) -> None:
        self._unwatch(engine)
        if engine.held:
            ending = asyncio.create_task(self._forked_ended(replica_id, engine, engine.held))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            return
        returncode = engine.popen.wait() if engine.popen else None
        engine.exited.set()
        self._on_exit(replica_id, returncode)

    async def _forked_ended(self, replica_id: str, engine: _Engine, held: HeldProcess) -> None:
        returncode = await held.returncode(_STATUS_TIMEOUT_S)
        held.drop()
        engine.exited.set()
        self._on_exit(replica_id, returncode)

    def _unwatch(self, engine: _Engine) -> None:
        if engine.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(engine.pidfd)
            os.close(engine.pidfd)
            engine.pidfd = -1

    # ------------------------------------------------------------------ the tree

    def leaders(self) -> dict[str, MainProcess]:
        """The main process of each replica, for `process.scan`."""
        return {replica_id: engine.leader for replica_id, engine in self._engines.items()}

    async def trees(self) -> dict[str, set[int]]:
        """The live processes of each replica of this node, also of unknown ones."""
        leaders = self.leaders()
        found = await asyncio.to_thread(process.scan, self._owner, leaders)
        for replica_id in self._cgroups.replica_ids():
            if pids := self._cgroups.pids(replica_id):
                found.setdefault(replica_id, set()).update(pids)
        return found

    async def live_pids(self) -> dict[str, set[int]]:
        """As `trees`, but costs nothing on a node that runs nothing."""
        return await self.trees() if self._engines else {}

    def terminate(self, replica_id: str) -> None:
        """SIGTERM to the main process alone, which ends its own children in order. What it
        leaves behind is for `kill_tree`."""
        engine = self._engines.get(replica_id)
        if engine and engine.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(engine.pidfd, signal.SIGTERM)

    async def kill_tree(self, replica_id: str) -> None:
        """SIGKILL to every process of the replica; returns when none is left."""
        engine = self._engines.get(replica_id)
        clock = asyncio.get_running_loop().time
        warn_at = clock() + _KILL_WARN_S
        while pids := (await self.trees()).get(replica_id):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_KILL_POLL_S)
            self._reap(pids, engine)
            if clock() >= warn_at:
                warn_at = clock() + _KILL_WARN_S
                log.warning("%s: still waiting for pids %s to die", replica_id, sorted(pids))
        if engine:
            await engine.exited.wait()

    def _reap(self, pids: set[int], engine: _Engine | None) -> None:
        """Orphans become our children where the agent is pid 1 of a container."""
        for pid in pids - ({engine.leader.pid} if engine else set()):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def forget(self, replica_id: str) -> None:
        """Drop what is kept of a replica whose tree is dead. Its log stays for a while."""
        engine = self._engines.pop(replica_id, None)
        if engine:
            self._unwatch(engine)
        self._cgroups.remove(replica_id)
        self._prune_logs()

    def close(self) -> None:
        """Stop watching; an engine that still lives, lives on."""
        for ending in self._endings:
            ending.cancel()
        for engine in self._engines.values():
            self._unwatch(engine)
            if engine.held:
                engine.held.drop()
            if engine.popen:
                engine.popen.returncode = 0  # not ours any more: Popen need not warn
        self._engines.clear()
        for replica_id in self._cgroups.replica_ids():
            self._cgroups.remove(replica_id)
        self._cgroups.close()

    # ------------------------------------------------------------------ logs

    def log_path(self, replica_id: str) -> Path:
        """Where the engine's output goes."""
        return places.below(self._logs, f"{replica_id}.log")

    def log_tail(self, replica_id: str) -> str:
        """The end of what the current start has written, at most 64 KiB."""
        try:
            with self.log_path(replica_id).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read()
        except FileNotFoundError:
            return ""
        return text.rpartition(_log_head(replica_id))[2].decode(errors="replace")

    def rotate_logs(self) -> None:
        """Copy a log over its limit to <name>.log.1 and empty it. Blocks.

        The engine keeps the file open, so it can't be renamed away; a line written between the
        copy and the cut is lost.
        """
        for replica_id in list(self._engines):
            path = self.log_path(replica_id)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size > LOG_LIMIT_BYTES:
                    _copy_and_truncate(path)

    def _prune_logs(self) -> None:
        ended = [p for p in self._logs.glob("*.log") if p.stem not in self._engines]
        for path in sorted(ended, key=lambda p: p.stat().st_mtime)[:-KEPT_LOGS]:
            path.unlink(missing_ok=True)
            path.with_suffix(".log.1").unlink(missing_ok=True)


def read_more(path: Path, position: int, most_bytes: int = -1) -> tuple[bytes, int]:
    """What a log got after `position`, at most `most_bytes` (-1: all), and where that ends.

    A log that is not there has got nothing. Blocks.
    """
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < position:
                position = 0  # it was rotated
            file.seek(position)
            text = file.read(most_bytes)
            return text, position + len(text)
    except FileNotFoundError:
        return b"", position


def _log_head(replica_id: str) -> bytes:
    """The line that parts the starts of one replica in its log."""
    return f"--- stoker starts {replica_id} ---\n".encode()


def _copy_and_truncate(path: Path) -> None:
    """Only the last LOG_LIMIT_BYTES are kept."""
    with path.open("r+b") as source, path.with_suffix(".log.1").open("wb") as target:
        source.seek(-LOG_LIMIT_BYTES, os.SEEK_END)
        while block := source.read(2**20):
            target.write(block)
        source.truncate(0)


def _open_cgroups(owner: Owner) -> Cgroups:
    try:
        return Cgroups.open(owner)
    except OSError as error:
        log.warning("engines get no cgroup of their own (%s); their marks alone find them", error)
        return Cgroups(None)
