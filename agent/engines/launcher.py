"""Engines forked from a pre-imported parent: starts that skip what every start would import again.

One parent (`runtime.engine.fork_server`) runs for each engine environment on this host: its
interpreter, preload module, and the variables that importing reads. It is started ahead of need,
and again when it died or when packages of its interpreter changed; while host memory is short there
is none.

Rules this file keeps:
- a start never fails because forking did: `CannotFork` says why, and the caller starts plainly;
- a forked process runs only once the caller lets it (`HeldProcess.release`), so that it is
  recorded first;
- parents end with the agent; what they forked lives on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from runtime import places
from runtime.engine.contract import Launch, Preload
from runtime.engine.fork_server import NUMBER, REFUSED, ForkRequest, ForkServerReady
from runtime.engine.process_image import PADDING_ENV

log = logging.getLogger("stoker.agent")

READY_TIMEOUT_S = 40.0  # a plain start of vLLM takes as long
FORK_TIMEOUT_S = 10.0
MAX_PARENTS = 2  # they hold some 600 MB each
SHORT_BYTES = 1 * 2**30  # with less host memory left, the parents go
ENOUGH_BYTES = 3 * 2**30  # and from here on they come back
_FIRST_PAUSE_S = 1.0  # before one that died is started again; doubles
_LONGEST_PAUSE_S = 60.0
_IMPORT_TIMEOUT_S = 300.0
_SETTLED_S = 5.0  # packages that changed less long ago may still be changing
_PADDING = 96 * 1024  # room for a replica's environment, in bytes
_ARGV_PADDING = 8 * 1024

Clock = Callable[[], float]


class CannotFork(Exception):
    """Why a start must be plain: `why` is one word for metrics, the message is for people."""

    def __init__(self, why: str, words: str) -> None:
        super().__init__(words)
        self.why = why


class HeldProcess:
    """A forked process that waits to be let go. The parent tells how it ended."""

    def __init__(self, answers: int, hold: int) -> None:
        self.pid = 0
        self._answers = answers
        self._hold = hold

    def release(self) -> None:
        """Let it run."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._hold, b"g")
        self._let_go()

    def drop(self) -> None:
        """End it, if it was not released; and hear no more of it."""
        self._let_go()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1

    def _let_go(self) -> None:
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1

    async def forked(self) -> None:
        """Wait for its pid. Raises CannotFork."""
        answer = await self._read(NUMBER.size)
        if len(answer) < NUMBER.size:
            raise CannotFork("died", "the launcher died")
        (self.pid,) = NUMBER.unpack(answer)
        if self.pid == REFUSED:
            raise CannotFork("unsafe", (await self._read(4096)).decode())

    async def returncode(self, timeout_s: float) -> int | None:
        """As of Popen, once it has ended; None if its parent died or says nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._read(NUMBER.size)
        except TimeoutError:
            return None
        return int(NUMBER.unpack(answer)[0]) if len(answer) == NUMBER.size else None

    async def _read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._answers, _resolve, readable)
        try:
            await readable
        finally:
            loop.remove_reader(self._answers)
        return os.read(self._answers, size)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Launcher:
    """The parents of one node. All methods are for the event loop's thread."""

    def __init__(self, logs: Path, base_env: Mapping[str, str], cwd: Path) -> None:
        """Engines start with `base_env` and what their launch adds, in `cwd`."""
        self._logs = logs
        self._base_env = dict(base_env)
        self._cwd = cwd
        self._parents: dict[bytes, _Parent] = {}
        self._enough = asyncio.Event()
        self._enough.set()

    def prepare(self, preload: Preload) -> None:
        """Have a parent for such engines, now and from now on."""
        self._parent(preload)

    async def fork(self, launch: Launch, env: Mapping[str, str], output: int) -> HeldProcess:
        """A process that will run `launch` with exactly `env`, writing to the file `output`.

        Waits for a parent that is still importing. Raises CannotFork.
        """
        if launch.preload is None or launch.argv[1] != "-m":
            raise CannotFork("engine", "this engine is not made to be forked")
        size = sum(len(os.fsencode(name + value)) + 2 for name, value in env.items())
        if size > _PADDING:
            raise CannotFork("unsafe", f"an environment of {size} bytes; {_PADDING} fit")
        sock = await self._parent(launch.preload).ready()
        request = ForkRequest(
            argv=launch.argv[2:], env=dict(env), cwd=str(self._cwd), show=launch.argv
        )
        held = _ask(sock, msgspec.json.encode(request), output)
        try:
            async with asyncio.timeout(FORK_TIMEOUT_S):
                await held.forked()
        except TimeoutError:
            held.drop()
            words = f"the launcher did not fork within {FORK_TIMEOUT_S:.0f} s"
            raise CannotFork("not_ready", words) from None
        except BaseException:
            held.drop()
            raise
        return held

    def keep(self, available_bytes: int) -> None:
        """Call every few seconds with the host's free memory: parents go while it is short, and
        those whose packages changed are replaced."""
        if available_bytes < SHORT_BYTES and self._enough.is_set():
            log.warning("host memory is short: engines start without the launcher from now on")
            self._enough.clear()
        elif available_bytes > ENOUGH_BYTES:
            self._enough.set()
        for parent in self._parents.values():
            if not self._enough.is_set() or parent.is_outdated():
                parent.end()

    @property
    def ready(self) -> int:
        """The parents that can fork now."""
        return sum(parent.is_ready for parent in self._parents.values())

    def pids(self) -> set[int]:
        """The processes of the parents."""
        return {parent.pid for parent in self._parents.values() if parent.pid}

    async def close(self) -> None:
        """End every parent."""
        parents = list(self._parents.values())
        self._parents.clear()
        await asyncio.gather(*(parent.close() for parent in parents))

    def _parent(self, preload: Preload) -> _Parent:
        key = msgspec.json.encode(preload, order="sorted")
        parent = self._parents.pop(key, None)
        if parent is None:
            while len(self._parents) >= MAX_PARENTS:
                self._parents.pop(next(iter(self._parents))).retire()
            parent = _Parent(preload, self._base_env, self._cwd, self._logs, self._enough)
        self._parents[key] = parent  # the last one used is the last one
        return parent


def _ask(sock: socket.socket, request: bytes, output: int) -> HeldProcess:
    answers, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    held, hold = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(theirs, True)
    process = HeldProcess(answers, hold)
    try:
        socket.send_fds(sock, [request], [theirs, output, held])
    except OSError as error:
        process.drop()
        raise CannotFork("died", f"the launcher can't be asked: {error}") from None
    finally:
        os.close(theirs)
        os.close(held)
    return process


class _Parent:
    """Keeps one parent process alive."""

    def __init__(
        self,
        preload: Preload,
        base_env: Mapping[str, str],
        cwd: Path,
        logs: Path,
        enough: asyncio.Event,
    ) -> None:
        self._preload = preload
        self._env = {**base_env, **preload.env, "SPT_NOENV": "1", PADDING_ENV: "-" * _PADDING}
        self._cwd = cwd
        name = hashlib.sha256(msgspec.json.encode(preload, order="sorted")).hexdigest()[:8]
        self._log = places.below(logs, f"launcher-{name}.out")
        self._enough = enough
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._answer: ForkServerReady | None = None
        self._changed = asyncio.Event()  # set while there is an answer
        self._over = asyncio.Event()
        self._failed = False  # the last one ended before it was ready
        self._task = asyncio.create_task(self._run())

    @property
    def is_ready(self) -> bool:
        return self._answer is not None and self._answer.refusal is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def ready(self) -> socket.socket:
        """The socket of a parent that has imported everything. Raises CannotFork."""
        if not self._enough.is_set():
            raise CannotFork("memory", "host memory is short, so there is no launcher")
        if self._failed:
            raise CannotFork("died", f"the launcher could not be started; see {self._log}")
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._changed.wait()
        except TimeoutError:
            words = f"the launcher was not ready within {READY_TIMEOUT_S:.0f} s"
            raise CannotFork("not_ready", words) from None
        if self._answer is None or self._sock is None:
            raise CannotFork("died", "the launcher died")
        if self._answer.refusal is not None:
            raise CannotFork("unsafe", self._answer.refusal)
        return self._sock

    def is_outdated(self) -> bool:
        """Whether packages changed since its imports, and have settled."""
        if self._answer is None:
            return False
        now = {folder: _mtime_ns(folder) for folder, _ in self._answer.stamp}
        if tuple(now.items()) == self._answer.stamp:
            return False
        return time.time_ns() - max(now.values()) > _SETTLED_S * 1e9

    def end(self) -> None:
        """End the process; another one is started unless memory is short."""
        self._over.set()
        if self._process:
            self._process.kill()

    def retire(self) -> None:
        """End it for good, without waiting."""
        self._task.cancel()

    async def close(self) -> None:
        """End it for good."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._enough.wait()
            begun = time.monotonic()
            await self._live()
            if time.monotonic() - begun > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _live(self) -> None:
        """One process, from start to end."""
        self._over.clear()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                try:
                    self._process = self._start(theirs)
                except OSError as error:
                    log.error("the launcher can't be started: %s", error)
                    self._failed = True
                    return
            try:
                await self._serve(ours)
            finally:
                self._answer = self._sock = None
                self._changed.clear()
                process, self._process = self._process, None
                process.kill()
                process.wait()

    def _start(self, sock: socket.socket) -> subprocess.Popen[bytes]:
        argv = [self._preload.python, "-m", "runtime.engine.fork_server"]
        argv += [str(sock.fileno()), self._preload.module, "-" * _ARGV_PADDING]
        with self._log.open("wb") as output:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                pass_fds=[sock.fileno()],
                start_new_session=True,
            )

    async def _serve(self, sock: socket.socket) -> None:
        """Until the process ends, or should."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        try:
            async with asyncio.timeout(_IMPORT_TIMEOUT_S):
                data = await loop.sock_recv(sock, 65536)
        except (TimeoutError, OSError):
            data = b""
        self._failed = not data
        if not data:
            log.warning("the launcher ended before it was ready; see %s", self._log)
            return
        self._answer = msgspec.json.decode(data, type=ForkServerReady)
        self._sock = sock
        self._changed.set()
        if self._answer.refusal is not None:
            log.warning("engines can't be forked: %s; they start plainly", self._answer.refusal)
            await self._over.wait()  # until packages change
            return
        log.info("the launcher is ready after %.1f s", self._answer.import_s)
        with contextlib.suppress(OSError):
            await loop.sock_recv(sock, 1)  # nothing more is ever sent: this is its end
        log.warning("the launcher ended")


def _mtime_ns(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0
