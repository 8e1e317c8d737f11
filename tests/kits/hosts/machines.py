"""Hosts for tests: Debian roots booted by systemd-nspawn, each with its own network and link.

A host's files are an overlay on the cached root, its network a namespace with one veth pair whose
other end hangs on a bridge of this run. So a link can be cut without a word: `unplug` takes the
pair's outer end off the bridge, and the host sees its own link up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kits.hosts.base_root import CannotMake, base_root

_BOOT_S = 90.0
_CLEAR_S = 10.0


class Machine:
    """One booted host."""

    def __init__(self, name: str, address: str, root: Path, leader: int, port: str, bridge: str):
        self.name = name
        self.address = address
        self.root = root
        self._leader = leader  # its systemd, as this machine numbers it
        self._port = port
        self._bridge = bridge

    def run(self, command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command inside as root; stdout and stderr come back as one text."""
        enter = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p"]
        env = ["env", "-i", "HOME=/root", "LC_ALL=C.UTF-8"]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            [*enter, *env, path, "bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def checked(self, command: str, timeout_s: float = 120) -> str:
        """The output of a command that must succeed."""
        done = self.run(command, timeout_s)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout[-3000:]}"
        return done.stdout

    def unplug(self) -> None:
        """Cut its link: nothing comes back any more, and nobody is told."""
        _ip("link", "set", self._port, "nomaster")

    def plug(self) -> None:
        """The link is whole again."""
        _ip("link", "set", self._port, "master", self._bridge)

    def logs(self, unit: str, lines: int = 60) -> str:
        """The last lines of a service's journal."""
        return self.run(f"journalctl --no-pager -o cat -n {lines} -u {unit}").stdout


class Machines:
    """The hosts of one test run, on one bridge; use `machines()`."""

    def __init__(self, folder: Path, number: int, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.key = folder / "key"
        self._number = number
        self._bridge = f"stkbr{number}"
        self._stack = stack
        self._count = 0

    def boot(self, name: str, *options: str, prepare: Callable[[Path], None] | None = None):
        """A new host, once its systemd has started everything; `options` are nspawn's."""
        self._count += 1
        address = f"198.18.{self._number}.{10 + self._count}"
        label = f"stk{self._number}-{self._count}"
        root = self._stack.enter_context(_overlay(self.folder / name))
        _make_it(root, name, self.key.with_suffix(".pub").read_text())
        if prepare:
            prepare(root)
        self._stack.enter_context(self._network(label, address))
        log = self.folder / f"{name}.console"
        leader = self._stack.enter_context(_booted(root, name, label, log, options))
        machine = Machine(name, address, root, leader, f"{label}h", self._bridge)
        _wait_until_up(machine, log)
        return machine

    @contextlib.contextmanager
    def _network(self, label: str, address: str) -> Iterator[None]:
        _ip("netns", "add", label)
        try:
            _ip("link", "add", f"{label}h", "type", "veth", "peer", "name", "host0", "netns", label)
            _ip("link", "set", f"{label}h", "master", self._bridge, "up")
            inside = ("-n", label)
            _ip(*inside, "addr", "add", f"{address}/24", "dev", "host0")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", "host0", "up")
            _ip(*inside, "route", "add", "default", "via", f"198.18.{self._number}.1")
            yield
        finally:
            _ip("netns", "del", label)


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """A bridge to put hosts on; all of it ends with the block. Raises CannotMake."""
    number = _free_number()
    bridge = f"stkbr{number}"
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"198.18.{number}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
        subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
        yield Machines(folder, number, stack)


def _free_number() -> int:
    """Which 198.18.N.0/24 (addresses meant for tests of networks) nobody here uses.

    A name that a run left behind somewhere is not used again: where one hierarchy has a cgroup that
    nspawn is about to make, it does not make it in the other, and does not start.
    """
    folders = (Path("/sys/class/net"), Path("/run/netns"), *_hierarchies())
    names = [name for folder in folders if folder.is_dir() for name in os.listdir(folder)]
    taken = {name.partition("-")[0].removeprefix("stkbr").removeprefix("stk") for name in names}
    return next(number for number in range(10, 250) if str(number) not in taken)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CannotMake(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _overlay(folder: Path) -> Iterator[Path]:
    upper, work, root = folder / "upper", folder / "work", folder / "root"
    for path in (upper, work, root):
        path.mkdir(parents=True)
        path.chmod(0o755)  # the host's /: its services' users must get in
    layers = f"lowerdir={base_root()},upperdir={upper},workdir={work}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "-o", layers, "stoker-test", str(root)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CannotMake(f"mount of an overlay: {done.stderr.strip()}")
    try:
        yield root
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(root)], check=True)


def _make_it(root: Path, name: str, public_key: str) -> None:
    (root / "etc/hostname").write_text(f"{name}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    (root / "etc/machine-id").write_text("uninitialized\n")
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    (ssh / "authorized_keys").write_text(public_key)


@contextlib.contextmanager
def _booted(
    root: Path, name: str, netns: str, log: Path, options: tuple[str, ...]
) -> Iterator[int]:
    """The pid of the host's systemd; it is powered off after the block."""
    command = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"]
    command += ["-D", str(root), f"--machine={netns}", f"--hostname={name}"]
    command += [f"--network-namespace-path=/run/netns/{netns}", "--resolv-conf=off"]
    command += ["--timezone=off", "--link-journal=no", *options]
    with _cgroups(netns) as groups, log.open("wb") as out:
        join = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in groups)
        nspawn = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "bash", "-c", f'{join} && exec "$@"', "_", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            yield _leader(nspawn, log)
        finally:
            nspawn.terminate()  # nspawn passes it on as an orderly power-off
            try:
                nspawn.wait(timeout=30)
            except subprocess.TimeoutExpired:
                nspawn.kill()
                nspawn.wait()


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """A cgroup of its own in each hierarchy that systemd keeps units in: two hosts whose systemds
    shared one would kill each other's services."""
    groups = [hierarchy / name for hierarchy in _hierarchies()]
    if not groups:
        raise CannotMake("no cgroup hierarchy for systemd (cgroup2, or name=systemd) is mounted")
    for group in groups:
        group.mkdir()
    try:
        yield groups
    finally:
        deadline = time.monotonic() + _CLEAR_S
        while not all(_removed(group) for group in groups) and time.monotonic() < deadline:
            time.sleep(0.1)  # its last processes are ending


def _hierarchies() -> list[Path]:
    """Where cgroups are that systemd keeps units in."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [
        Path(where)
        for _, where, kind, options, *_ in mounts
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options)
    ]


def _removed(group: Path) -> bool:
    """Whether a cgroup is gone, and all below it."""
    # `walk` and not `rglob`: the host's last processes take folders away meanwhile.
    below = sorted((Path(folder) for folder, _, _ in os.walk(group)), reverse=True)
    for path in below:
        with contextlib.suppress(OSError):
            path.rmdir()
    return not group.exists()


def _leader(nspawn: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _BOOT_S
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    while time.monotonic() < deadline and nspawn.poll() is None:
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() in ("systemd", "init"):
                    return int(child)
        time.sleep(0.1)
    raise CannotMake(f"systemd-nspawn did not boot: {_tail(log)}")


def _wait_until_up(machine: Machine, log: Path) -> None:
    deadline = time.monotonic() + _BOOT_S
    state = ""
    while time.monotonic() < deadline:
        state = machine.run("systemctl is-system-running").stdout.strip()
        if state in ("running", "degraded"):
            return
        time.sleep(0.3)
    raise CannotMake(f"{machine.name} did not finish its boot ({state}): {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-800:]
