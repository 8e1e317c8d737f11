"""A parent that has imported an engine once, and forks it: `python -m runtime.engine.fork_server`.

The agent starts it with one end of a SEQPACKET socket and asks over it for processes
(`ForkRequest`). It ends when the agent's end closes; what it forked lives on.

Rules this file keeps:
- a process is forked only while this one has a single thread and has not touched CUDA; else the
  answer says why not, and the agent starts the engine plainly;
- a forked process ends up as if it had been started by the agent: its own session, environment,
  command line, output and random state, and none of this process's files;
- nothing of an engine is known here: the preload module imports it and patches it after a fork.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import selectors
import site
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

import msgspec
from msgspec import Struct

from runtime.engine import process_image

MAX_REQUEST_BYTES = 160 * 1024  # below the kernel's usual limit of a packet, 208 KiB
REFUSED = -1  # in place of a pid; the reason follows as text
NUMBER = struct.Struct("q")
_MAX_FDS = 64


class ForkRequest(Struct, frozen=True):
    """Run `python -m argv[0] *argv[1:]`.

    Three files come with it: a pipe for the answer (its pid as a NUMBER, and when it ended its
    exit status as Popen.returncode has it; or REFUSED and why), the file for its output, and a pipe
    that holds it back: it runs once a byte is there, and ends if that pipe closes first.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    show: tuple[str, ...]  # the command line that /proc shall show


class ForkServerReady(Struct, frozen=True):
    """Sent once: the imports are done, or `refusal` says why nothing will ever be forked.

    What the answer rests on holds as long as `stamp` is what `environment_stamp` says.
    """

    stamp: tuple[tuple[str, int], ...]
    refusal: str | None = None
    import_s: float = 0.0


class ForkRefused(Exception):
    """A fork that must not be; the message says why."""


class Preload:
    """The engine's preload module and what importing it did to this process."""

    def __init__(self, name: str, stamp: tuple[tuple[str, int], ...]) -> None:
        before = dict(os.environ)
        self._stamp = stamp
        self.module: ModuleType = importlib.import_module(name)
        self._set = {k: v for k, v in os.environ.items() if before.get(k) != v}
        settle_threads()
        gc.collect()
        gc.freeze()  # or the first collection of each child would copy every page

    def check(self) -> None:
        """Raises ForkRefused where a fork now would not equal a plain start."""
        if environment_stamp() != self._stamp:
            raise ForkRefused("packages were installed or removed since the imports")
        if (count := thread_count()) != 1:
            raise ForkRefused(f"the parent has {count} threads")
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise ForkRefused("the parent has initialised CUDA")

    def after_fork(self, argv: Sequence[str]) -> None:
        """In the child, once its own environment is there."""
        os.environ.update(self._set)
        fresh_state()
        multiprocessing.current_process().authkey = os.urandom(32)
        if hook := getattr(self.module, "after_fork", None):
            hook(argv)


def fresh_state() -> None:
    """Undo, in a forked process, what two processes must not share. (Python itself sees to
    `random`, OpenSSL to its own.)"""
    tempfile.tempdir = None  # read from the environment again
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def thread_count() -> int:
    """The threads of this process, also those that Python does not know."""
    return len(os.listdir("/proc/self/task"))


def settle_threads() -> None:
    """End the thread pools that know how to: OpenBLAS (numpy's and OpenCV's) starts one when it is
    loaded, ends it before any fork, and starts it again when it is needed."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def environment_stamp() -> tuple[tuple[str, int], ...]:
    """Changes when a package of this interpreter is installed, upgraded or removed."""
    stamps = []
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        with contextlib.suppress(OSError):
            stamps.append((folder, os.stat(folder).st_mtime_ns))
    return tuple(stamps)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and the files that came with it; (b"", []) when every sender is gone."""
    size = _MAX_FDS * array.array("i").itemsize
    data, ancillary, _, _ = sock.recvmsg(MAX_REQUEST_BYTES, socket.CMSG_SPACE(size))
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    for fd in fds:
        os.set_inheritable(fd, False)
    return data, list(fds)


Child = Callable[[], int | None]
Handle = Callable[[bytes, list[int]], None]


class ForkLoop:
    """Forks on request until every sender is gone, and tells each one what became of its child.

    The first file of a request is the pipe for the answers. `check` may raise ForkRefused.
    """

    def __init__(self, sock: socket.socket, check: Callable[[], None]) -> None:
        self._sock = sock
        self._check = check
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> (pid, answers)

    def run(self) -> tuple[bytes, list[int]] | None:
        """None in this process, once the senders are gone. In a forked one: its request and the
        other files; nothing of this loop is open there any more."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._sock:
                    self._reap(int(key.fd))
                    continue
                data, fds = receive(self._sock)
                if not data:
                    return None
                if self._fork(fds[0]):
                    return data, fds[1:]
                for fd in fds[1:]:
                    os.close(fd)

    def _fork(self, answers: int) -> bool:
        """True in the child."""
        try:
            self._check()
            pid = os.fork()
        except (ForkRefused, OSError) as error:
            _tell(answers, NUMBER.pack(REFUSED) + str(error).encode())
            os.close(answers)
            return False
        if pid == 0:
            os.close(answers)
            self._close()
            return True
        _tell(answers, NUMBER.pack(pid))
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, answers)
        self._selector.register(pidfd, selectors.EVENT_READ)
        return False

    def _reap(self, pidfd: int) -> None:
        pid, answers = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        _tell(answers, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(answers)

    def _close(self) -> None:
        self._selector.close()
        for pidfd, (_, answers) in self._children.items():
            os.close(pidfd)
            os.close(answers)
        self._children.clear()


def _tell(answers: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked has gone
        os.write(answers, data)


def _become(request: ForkRequest, fds: Sequence[int], preload: Preload) -> None:
    """Turn this forked process into the one that was asked for; returns when it may run."""
    output, hold = fds
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    process_image.replace_environment(request.env)
    process_image.set_title(request.show)
    os.chdir(request.cwd)
    if not os.read(hold, 1):
        os._exit(0)  # the agent changed its mind, or is gone
    os.close(hold)
    preload.after_fork(request.argv)


def _import(name: str) -> tuple[Preload | None, ForkServerReady]:
    begun, stamp = time.monotonic(), environment_stamp()
    try:
        preload = Preload(name, stamp)
        preload.check()
    except ForkRefused as error:
        return None, ForkServerReady(stamp, str(error))
    except Exception as error:
        traceback.print_exc()
        return None, ForkServerReady(stamp, f"importing {name} failed: {error!r}")
    return preload, ForkServerReady(stamp, import_s=time.monotonic() - begun)


def main(argv: Sequence[str]) -> None:
    """`argv`: the socket's file number, the preload module, and padding."""
    sock = socket.socket(fileno=int(argv[0]))
    sock.set_inheritable(False)
    os.environ.pop(process_image.PADDING_ENV, None)
    preload, ready = _import(argv[1])
    # Not before the imports: the engine's setproctitle looks for the arguments in memory.
    process_image.set_title(["stoker-launcher", argv[1]])
    try:
        sock.send(msgspec.json.encode(ready))
    except OSError:
        return
    if preload is None:
        return
    job = ForkLoop(sock, preload.check).run()
    sock.close()
    if job is None:
        return
    request = msgspec.json.decode(job[0], type=ForkRequest)
    _become(request, job[1], preload)
    # From here on this process is the engine: it ends as one that was started plainly.
    sys.argv[:] = request.argv
    code: object = None
    try:
        runpy.run_module(request.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    _end(code)


def _end(code: object) -> NoReturn:
    """End as `sys.exit(code)` does, but leave the objects to the kernel: taking them apart would
    copy every page that is shared with the parent, for seconds on a busy host."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    vars(threading)["_shutdown"]()  # waits for the threads that are no daemons
    vars(atexit)["_run_exitfuncs"]()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    # As the module that the preload imports too, so that there is one of each class.
    from runtime.engine import fork_server

    fork_server.main(sys.argv[1:])
