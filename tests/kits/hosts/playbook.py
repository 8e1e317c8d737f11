"""Runs the playbook of this checkout against test hosts, over SSH, as an operator would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kits.checkout import ROOT
from tests.kits.hosts.base_root import wheelhouse
from tests.kits.hosts.machines import Machine

SETTINGS: dict[str, object] = {
    "stoker_cluster_token": 'a-test\'s "own" token, 0123',
    "stoker_pip_args": "--no-index --find-links /wheelhouse",
    "stoker_engine": "none",
    "stoker_engine_ports": "20000-20099",
    "stoker_agent": {"devices": "simulated:1x8GiB", "labels": {"rack": "r7"}},
    "stoker_os_packages": ["python3-venv", "ca-certificates", "g++", "python3-dev", "libnuma1"],
}

_RECAP = re.compile(r"^(\S+)\s+: (ok=.*)$", re.MULTILINE)
_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


class Played:
    """What a run of a playbook said: per host the counts of the recap, and everything."""

    def __init__(self, output: str, status: int, took_s: float = 0.0) -> None:
        self.output = output
        self.status = status
        self.took_s = took_s
        self.counts = {
            host: {k: int(v) for k, v in (pair.split("=") for pair in counts.split())}
            for host, counts in _RECAP.findall(output)
        }

    def total(self, what: str) -> int:
        """The sum of one count (changed, failed …) over all hosts."""
        return sum(counts[what] for counts in self.counts.values())

    def succeeded(self) -> Played:
        """Itself, or an assertion with the output's end."""
        assert self.status == 0, self.output[-6000:]
        assert self.counts, self.output[-3000:]
        return self


class Site:
    """An operator's folder: inventory, settings, a wheel; `groups` as {group: [machine …]}."""

    def __init__(
        self, folder: Path, key: Path, groups: Mapping[str, Sequence[Machine]], **settings: object
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.hosts = {host.name: host for members in groups.values() for host in members}
        children = {
            group: {"hosts": {host.name: {"ansible_host": host.address} for host in members}}
            for group, members in groups.items()
        }
        variables = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(key),
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        folder.mkdir(exist_ok=True)
        self.inventory = folder / "inventory.json"
        self.inventory.write_text(json.dumps({"all": {"vars": variables, "children": children}}))

    def play(
        self, *options: str, book: str = "site.yml", ansible: Path | None = None, **settings: object
    ) -> Played:
        """Run a playbook with these settings on top of the site's."""
        variables = self.folder / "settings.json"
        variables.write_text(json.dumps({**self.settings, **settings}))
        command = [str(_PLAYBOOK), "-i", str(self.inventory), "-e", f"@{variables}", *options, book]
        environ = {
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_SSH_PIPELINING": "True",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=60s"
            " -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "cp"),
            "ANSIBLE_LOCALHOST_WARNING": "False",
        }
        began = time.monotonic()
        done = subprocess.run(
            command,
            cwd=ansible or ROOT / "ansible",
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        return Played(done.stdout, done.returncode, time.monotonic() - began)


def make_wheel(folder: Path, version: str = "") -> Path:
    """The wheel of this checkout, as `make wheel` builds it; `version`: that of another release."""
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("runtime", "scheduler", "agent", "cli"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    if version:
        project = checkout / "pyproject.toml"
        text = re.sub(r'^version = ".*"', f'version = "{version}"', project.read_text(), flags=re.M)
        project.write_text(text)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", str(folder / "dist")]
    done = subprocess.run([*pip, str(checkout)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next((folder / "dist").glob("*.whl"))


def wheels(engine: str = "base") -> str:
    """The option of nspawn that shows a host the packages."""
    return f"--bind-ro={wheelhouse(engine)}:/wheelhouse"
