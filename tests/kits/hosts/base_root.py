"""The Debian that every test host begins as: debootstrap once, kept in a cache, never changed.

The cache is `$STOKER_HOSTS_CACHE`, or ~/.cache/stoker/hosts: a root of about 700 MB with systemd,
an SSH server, the packages that the playbook asks for, and Consul; and a folder of wheels.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.kits.checkout import ROOT

_PACKAGES = (
    "systemd,systemd-sysv,libpam-systemd,dbus,openssh-server,iproute2,ca-certificates,"
    "python3,python3-apt,python3-venv,python3-dev,g++,libnuma1"
)
_PYTORCH = "https://download.pytorch.org/whl/cpu"
_TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "ip", "ssh", "ssh-keygen")


class CannotMake(Exception):
    """The hosts cannot be made here; the message says why."""


def missing() -> str | None:
    """Why this machine cannot run such hosts, or None."""
    if os.geteuid() != 0:
        return "needs root, to make a Debian root and to boot it"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(absent)}" if absent else None


def base_root() -> Path:
    """The root to lay under each host's own files. Raises CannotMake, with the last words."""
    installer = ROOT / "scripts/install_consul.sh"
    name = _digest(_PACKAGES.encode(), installer.read_bytes())
    with _once(f"root-{name}") as (folder, new):
        if new:
            _run(
                "debootstrap",
                "--variant=minbase",
                f"--include={_PACKAGES}",
                "bookworm",
                str(folder),
                _mirror(),
            )
            shutil.copy(installer, folder / "root/install_consul.sh")
            for source in Path("/etc/apt").glob("apt.conf.d/*prox*"):
                shutil.copy(source, folder / "etc/apt/apt.conf.d/")
            shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
            _run("chroot", str(folder), "bash", "/root/install_consul.sh")
    return folder


def wheelhouse(engine: str = "base") -> Path:
    """The packages of requirements/base.txt or cpu.txt, so that no host needs a package index."""
    lists = [ROOT / "requirements" / f"{engine}.txt"]
    if engine == "cpu":
        lists.append(ROOT / "requirements/torch-cpu.txt")
    with _once(f"wheels-{_digest(*(each.read_bytes() for each in lists))}") as (folder, new):
        if new:
            pip = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "-d", str(folder)]
            for each in lists:
                own = ["--extra-index-url", _PYTORCH] if each.name.startswith("torch") else []
                _run(*pip, *own, "-r", str(each))
    return folder


@contextlib.contextmanager
def _once(name: str) -> Iterator[tuple[Path, bool]]:
    """A folder of the cache; True: it is empty, and is kept if the block ends without an error."""
    default = Path.home() / ".cache/stoker/hosts"
    cache = Path(os.environ.get("STOKER_HOSTS_CACHE") or default)
    cache.mkdir(parents=True, exist_ok=True)
    folder, done = cache / name, cache / f"{name}.complete"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = not done.exists()
        if new:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            folder.chmod(0o755)  # whatever the umask: a host's service users look in here
        yield folder, new
        done.touch()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _run(*command: str) -> None:
    done = subprocess.run(_quiet(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        words = done.stdout.decode(errors="replace").strip()[-600:]
        raise CannotMake(f"{' '.join(command[:2])} failed: {words}")


def _quiet(command: Sequence[str]) -> list[str]:
    return ["env", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", *command]


def _mirror() -> str:
    """Where this machine's own packages come from."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("debian*")]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    found = re.search(r"^(?:URIs:\s*|deb\s+(?:\[[^]]*\]\s+)?)(\S+/debian)/?\s", text, re.MULTILINE)
    if not found:
        raise CannotMake("found no Debian mirror among this machine's apt sources")
    return found[1]
