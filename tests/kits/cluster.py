"""A real `stoker up` for tests: every part a process, the stub engine, simulated devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.kits.checkout import ROOT

# A model's first save imports vLLM to check its arguments: 10 s alone, over 30 s on a busy host.
ADMIN_S = 150  # the scheduler waits for 120 s (INSPECT_TIMEOUT_S)


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = 60.0) -> Any:
    """The first truthy answer of `condition`; an AssertionError names `what` never came."""
    deadline = time.monotonic() + limit_s
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only awaits its parent's wait() does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Cluster:
    """One running stack. `router` and `admin` are base URLs."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, str]) -> None:
        self.process = process
        self.state_dir = Path(ready["state_dir"])
        self.router = ready["router"]

    @property
    def up(self) -> dict[str, str]:
        return json.loads((self.state_dir / "up.json").read_text())

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """One admin call; asserts that it went well."""
        headers = {"Authorization": f"Bearer {self.up['token']}"}
        answer = requests.request(
            method, self.up["admin"] + path, json=body, headers=headers, timeout=ADMIN_S
        )
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def try_admin(self, path: str) -> Any:
        """An admin GET, or None while the scheduler does not answer."""
        try:
            return self.admin("GET", path)
        except (requests.RequestException, AssertionError):
            return None

    def add_stub(self, name: str, gib: int = 8, **fields: Any) -> None:
        spec = {"name": name, "source": "/stub", "engine": "stub", **fields}
        self.admin("POST", "/admin/models", {**spec, "device_memory_bytes": f"{gib}GiB"})

    def complete(self, model: str, max_tokens: int = 4, timeout: float = 60) -> requests.Response:
        body: dict[str, Any] = {"model": model, "prompt": "one two three", "max_tokens": max_tokens}
        return requests.post(f"{self.router}/v1/completions", json=body, timeout=timeout)

    def stoker(self, *words: str, status: int = 0) -> str:
        """What a command of the CLI prints on stdout; with a bad `status` what is on stderr too."""
        argv = [sys.executable, "-m", "cli.main", *words]
        environ = {"PATH": "/usr/bin:/bin", "STOKER_STATE_DIR": str(self.state_dir)}
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environ,
            timeout=ADMIN_S,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stdout + done.stderr

    def replicas(self, model: str | None = None) -> list[dict[str, Any]]:
        found = self.admin("GET", "/admin/replicas")["replicas"]
        return [r for r in found if model in (None, r["model"])]

    def part(self, name: str) -> psutil.Process:
        """The process of one part."""
        for child in psutil.Process(self.process.pid).children():
            if name in child.cmdline():
                return child
        raise AssertionError(f"no {name} process")

    def kill_part(self, name: str) -> None:
        """kill -9, and wait until another one was started in its place."""
        old = self.part(name)
        old.kill()

        def another() -> bool:
            try:
                return self.part(name).pid != old.pid
            except (AssertionError, psutil.Error):
                return False

        wait_until(another, f"another {name} process")

    def engine_pids(self) -> dict[str, int]:
        """replica_id -> pid of each engine's main process, those that are alive."""
        pids = {r["replica_id"]: r["pid"] for r in self.replicas()}
        return {rid: pid for rid, pid in pids.items() if pid and alive(pid)}

    def processes(self) -> list[psutil.Process]:
        """Every live process that this cluster started."""
        mine = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            info = process.info
            text = " ".join(info["cmdline"] or []) + " ".join((info["environ"] or {}).values())
            if str(self.state_dir) in text and process.pid not in (os.getpid(), self.process.pid):
                mine.append(process)
        return mine


@contextmanager
def running(state_dir: Path, *options: str, **environ: str) -> Iterator[Cluster]:
    """`stoker up` until the block ends; then it must leave by itself, with nothing left behind."""
    argv = [sys.executable, "-m", "cli.main", "up", "--port", "0", "--json"]
    argv += ["--state-dir", str(state_dir), *options]
    log = open(state_dir.parent / f"{state_dir.name}.up.log", "w")  # noqa: SIM115  # outlives this
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=os.environ | environ
    )
    cluster = None
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, Path(log.name).read_text()
        cluster = Cluster(process, json.loads(line))
        yield cluster
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(ADMIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            log.close()
        left = cluster.processes() if cluster else []
        assert not left, f"left behind: {[p.cmdline() for p in left]}"
