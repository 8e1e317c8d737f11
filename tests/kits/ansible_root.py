"""A throw-away Debian that Ansible is applied to: made with debootstrap, entered with chroot in
namespaces of its own.

Whatever runs inside can neither write a kernel setting (/proc/sys is read-only, and there is no
/sys) nor reach this machine's cgroups, devices, processes or, with `network=False`, its network.
All of it ends with the command.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kits.checkout import ROOT

_ENTER = """
set -e
R=$1; shift
mount --make-rprivate /
mount -t proc proc $R/proc
mount --bind $R/proc/sys $R/proc/sys
mount -o remount,bind,ro $R/proc/sys
mount -t tmpfs -o mode=755 tmpfs $R/dev
for node in null zero full random urandom tty; do
    touch $R/dev/$node
    mount --bind /dev/$node $R/dev/$node
done
mkdir $R/dev/shm $R/dev/pts
mount -t tmpfs tmpfs $R/dev/shm
ln -s /proc/self/fd $R/dev/fd
mount -t tmpfs -o mode=755 tmpfs $R/run
[ "$1" = own-network ] && ip link set lo up
shift
exec env -i SYSTEMD_OFFLINE=1 HOME=/root LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    chroot $R "$@"
"""
_TOOLS = ("debootstrap", "unshare", "chroot", "ip")
_PACKAGES = "python3,python3-venv,ca-certificates,systemd"


class CannotMake(Exception):
    """The root cannot be made here; the message says why."""


def missing() -> str | None:
    """Why this machine cannot make such a root, or None."""
    if os.geteuid() != 0:
        return "needs root, to make a Debian root and to chroot into it"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(absent)}" if absent else None


class Root:
    """The Debian in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Raises CannotMake, with debootstrap's last words."""
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm"]
        done = subprocess.run([*command, str(self.path), _mirror()], capture_output=True, text=True)
        if done.returncode:
            raise CannotMake(f"debootstrap failed: {done.stdout.strip()[-400:]}")
        no_starts = self.path / "usr/sbin/policy-rc.d"  # packages must start nothing when installed
        no_starts.write_text("#!/bin/sh\nexit 101\n")
        no_starts.chmod(0o755)

    def run(
        self, *command: str, network: bool = True, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` inside; stdout and stderr come back as one text."""
        namespaces = ["--mount", "--pid", "--ipc", "--uts", *([] if network else ["--net"])]
        enter = ["unshare", *namespaces, "--fork", "--kill-child", "bash", "-c", _ENTER, "enter"]
        return subprocess.run(
            [*enter, str(self.path), "network" if network else "own-network", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def checked(self, *command: str) -> str:
        """The output of a command that must succeed."""
        done = self.run(*command)
        if done.returncode:
            raise CannotMake(f"{' '.join(command)}: {done.stdout[-800:]}")
        return done.stdout


def _mirror() -> str:
    """Where this machine's own packages come from."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("debian*")]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    found = re.search(r"^(?:URIs:\s*|deb\s+(?:\[[^]]*\]\s+)?)(\S+/debian)/?\s", text, re.MULTILINE)
    if not found:
        raise CannotMake("found no Debian mirror among this machine's apt sources")
    return found[1]


def fill(root: Root, scratch: Path) -> None:
    """Put into /src of the root what an operator has: the wheel, the playbook, the lock files.

    Packages come from a folder, /wheelhouse, so that nothing inside needs this machine's pip.
    """
    checkout, source = scratch / "checkout", root.path / "src"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("runtime", "scheduler", "agent", "cli"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("ansible", "requirements", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    _pip("wheel", "--no-deps", "-w", str(source / "dist"), str(checkout))
    wheelhouse = str(root.path / "wheelhouse")
    base = ROOT / "requirements" / "base.txt"
    _pip("download", "--no-deps", "-d", wheelhouse, "-r", str(base))
    _pip("download", "-d", wheelhouse, "ansible-core>=2.19")
    root.checked("python3", "-m", "venv", "/ansible")
    from_folder = ("--no-index", "--find-links", "/wheelhouse")
    root.checked("/ansible/bin/pip", "install", "-q", *from_folder, "ansible-core")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"pip {' '.join(arguments)}: {done.stderr[-2000:]}")
