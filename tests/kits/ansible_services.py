"""Runs inside the root: starts the units as systemd would (same command, user, folder, environment
and no new privileges; the sandbox is systemd's own and is not there), and prints what happened."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PORTS = {"scheduler": 8081, "router": 8080, "agent": 8082}
MODEL = {"name": "tiny", "source": "/tmp/tiny", "engine": "stub", "device_memory_bytes": "1GiB"}


def unit(name: str) -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in Path(f"/etc/systemd/system/{name}.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(key, []).append(value)
    return settings


def start(part: str) -> subprocess.Popen[bytes]:
    settings = unit(f"stoker-{part}")
    user, group = settings["User"][0], settings["Group"][0]
    assert settings["NoNewPrivileges"] == ["yes"]
    assert settings["CapabilityBoundingSet"] == [""]
    drop = f"setpriv --reuid={user} --regid={group} --clear-groups --no-new-privs"
    drop += " --bounding-set=-all"
    environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    for line in settings.get("Environment", []):
        environ |= dict(pair.split("=", 1) for pair in shlex.split(line))
    log = Path(f"/tmp/{part}.log").open("ab")  # noqa: SIM115 - the child's from now on
    return subprocess.Popen(
        [*drop.split(), *shlex.split(settings["ExecStart"][0])],
        cwd=settings["WorkingDirectory"][0],
        env=environ,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def get(url: str) -> str:
    """The body of a 200, which is true even where it is empty."""
    with urllib.request.urlopen(url, timeout=2) as answer:
        return f"{answer.status} {answer.read().decode()}"


def wait(what: str, ready, within_s: float = 40.0):
    """The first truthy answer of `ready`; exits with the logs after `within_s`."""
    deadline = time.monotonic() + within_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = ready()
            if last:
                return last
        except (OSError, ValueError, LookupError) as error:
            last = error
        time.sleep(0.2)
    for log in sorted(Path("/tmp").glob("*.log")):
        print(f"== {log}\n{log.read_text()[-2000:]}")
    sys.exit(f"waited in vain for {what}; last: {last!r}")


def stoker(*arguments: str) -> object:
    command = ["/opt/stoker/venv/bin/stoker", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{' '.join(arguments)}: {done.stdout} {done.stderr}")
    return json.loads(done.stdout or "null")


def healthy(part: str) -> object:
    return wait(f"the {part}", lambda: get(f"http://127.0.0.1:{PORTS[part]}/healthz"))


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    process.send_signal(number)
    return process.wait(timeout=40)


def engines() -> set[int]:
    """Pids of processes of the service user that are not a part."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            owner = folder.stat().st_uid
        except OSError:
            continue
        if owner == OWNER and b"--config" not in command and command != [b""]:
            found.add(int(folder.name))
    return found


OWNER = Path("/var/lib/stoker").stat().st_uid
consul = subprocess.Popen(
    shlex.split(
        "setpriv --reuid=consul --regid=consul --clear-groups"
        " consul agent -config-dir=/etc/consul.d"
    ),
    stdout=Path("/tmp/consul.log").open("wb"),  # noqa: SIM115
)
wait("Consul's leader", lambda: ":8300" in get("http://127.0.0.1:8500/v1/status/leader"))
parts = {part: start(part) for part in PORTS}
health = {part: healthy(part) for part in PORTS}
nodes = wait("the node", lambda: '"one"' in json.dumps(stoker("nodes")) and stoker("nodes"))

Path("/tmp/tiny").mkdir(exist_ok=True)
Path("/tmp/model.json").write_text(json.dumps(MODEL))
wait("the model to be added", lambda: stoker("model", "add", "/tmp/model.json") or True)
wait("the model to load", lambda: stoker("load", "tiny") or True)
before = engines()
detached = end(parts["agent"], signal.SIGUSR1)
left = engines()
parts["agent"] = start("agent")
healthy("agent")
adopted = wait("the replica to be adopted", lambda: "ready" in json.dumps(stoker("ps")))
after = engines()
stopped = {part: end(parts[part], signal.SIGTERM) for part in ("agent", "router", "scheduler")}
print(
    json.dumps(
        {
            "health": health,
            "nodes": nodes,
            "engines": [sorted(before), sorted(left), sorted(after), sorted(engines())],
            "detached": detached,
            "adopted": adopted,
            "stopped": stopped,
        }
    )
)
consul.terminate()
consul.wait(timeout=20)
