"""Starts a real Consul server for tests: free loopback ports, everything in a temp folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MISSING = (
    "no `consul` program on PATH: run scripts/install_consul.sh as root to run the Consul tests"
)
START_S = 60.0
# Elections in a second instead of ten: there is nobody to wait for.
CONFIG = "performance { raft_multiplier = 1 }"
ACL = 'acl { enabled = true default_policy = "deny" }'


def consul_is_installed() -> bool:
    return shutil.which("consul") is not None


@contextlib.contextmanager
def consul_server(acl: bool = False) -> Iterator[str]:
    """The URL of a server of its own, ready for sessions; killed at the end.

    With `acl` it denies everything until `bootstrap_token(url)` was called, which also waits until
    it is ready. Raises RuntimeError with the end of Consul's log if it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="stoker-consul-") as folder:
        process, url = _start(Path(folder), acl)
        try:
            if not acl:
                _until_ready(url, None)
            yield url
        except TimeoutError as error:
            tail = (Path(folder) / "log").read_text()[-2000:]
            raise RuntimeError(f"Consul did not come up: {error}; its log ends:\n{tail}") from error
        finally:
            process.kill()
            process.wait()


def bootstrap_token(url: str) -> str:
    """The all-powerful token of a new server with ACLs, once the server is ready."""
    made = _until(lambda: _call(f"{url}/v1/acl/bootstrap", method="PUT"), "ACL bootstrap")
    token = str(made["SecretID"])
    _until_ready(url, token)
    return token


def free_ports(count: int) -> list[int]:
    """Loopback TCP ports that nobody listens on right now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(folder: Path, acl: bool) -> tuple[subprocess.Popen[bytes], str]:
    config = folder / "config.hcl"
    config.write_text(f"{CONFIG}\n{ACL if acl else ''}\n")
    for attempt in range(5):  # another process may take a port between the choice and its use
        http, server, serf = free_ports(3)
        command = ["consul", "agent", "-server", "-bootstrap-expect=1", "-node=test"]
        command += ["-bind=127.0.0.1", "-client=127.0.0.1", f"-config-file={config}"]
        command += [f"-data-dir={folder / f'data{attempt}'}", f"-http-port={http}"]
        command += [f"-server-port={server}", f"-serf-lan-port={serf}", "-serf-wan-port=-1"]
        command += ["-dns-port=-1", "-grpc-port=-1"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{http}"
        if _listens(process, url):
            return process, url
        process.kill()
        process.wait()
    raise RuntimeError(
        f"Consul does not start; its log ends:\n{(folder / 'log').read_text()[-2000:]}"
    )


def _listens(process: subprocess.Popen[bytes], url: str) -> bool:
    """True once its HTTP port answers; False if the process ended or never listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            _call(f"{url}/v1/status/leader")
            return process.poll() is None
        time.sleep(0.05)
    return False


def _until_ready(url: str, token: str | None) -> None:
    """Wait until there is a leader and the node may hold sessions."""

    def healthy() -> bool:
        checks = _call(f"{url}/v1/health/node/test", token)
        return any(c["CheckID"] == "serfHealth" and c["Status"] == "passing" for c in checks)

    _until(healthy, "the node's health")


def _until(question: Any, what: str) -> Any:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # refused, or an HTTP error while it elects itself
            answer = question()
            if answer:
                return answer
        time.sleep(0.05)
    raise TimeoutError(f"no answer about {what} within {START_S:g} s")


def _call(url: str, token: str | None = None, method: str = "GET") -> Any:
    request = urllib.request.Request(url, method=method)
    if token:
        request.add_header("X-Consul-Token", token)
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)
