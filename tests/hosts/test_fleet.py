"""The playbook on three Debian hosts: Consul on all, two schedulers, two routers, two agents."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from machines import Machine, Machines
from playbook import SETTINGS, Site, wheels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROLES = {
    "consul": ("one", "two", "three"),
    "scheduler": ("one", "two"),
    "router": ("one", "two"),
    "agent": ("two", "three"),
}


@pytest.fixture(scope="module")
def site(fleet: Machines, wheel: Path) -> Site:
    hosts = {name: fleet.boot(name, wheels()) for name in ROLES["consul"]}
    groups = {role: [hosts[name] for name in names] for role, names in ROLES.items()}
    settings = {**SETTINGS, "stoker_wheel": str(wheel)}
    return Site(fleet.folder / "site", fleet.key, groups, **settings)


@pytest.fixture(scope="module")
def installed(site: Site) -> Site:
    """The hosts after the playbook; without a host that failed."""
    played = site.play().succeeded()
    assert played.counts.keys() == site.hosts.keys()
    assert played.total("failed") == played.total("unreachable") == 0
    return site


def units(host: Machine) -> list[str]:
    """What must run there."""
    parts = {
        "consul": ["consul"],
        "scheduler": ["stoker-scheduler"],
        "router": ["stoker-router.socket", "stoker-router"],
        "agent": ["stoker-agent"],
    }
    return [unit for role, names in parts.items() if host.name in ROLES[role] for unit in names]


def test_every_service_runs_and_a_second_run_changes_nothing(installed: Site) -> None:
    for host in installed.hosts.values():
        for unit in units(host):
            state = host.run(f"systemctl is-active {unit}").stdout.strip()
            assert state == "active", f"{unit} on {host.name}: {host.logs(unit)}"
    again = installed.play().succeeded()
    assert again.total("changed") == 0, again.output[-4000:]


def test_every_host_sees_both_agents(installed: Site) -> None:
    for host in installed.hosts.values():
        nodes = json.loads(host.checked("stoker nodes --json"))["nodes"]
        live = {node["node_id"] for node in nodes if node["state"] != "lost"}
        assert live == set(ROLES["agent"]), (host.name, nodes)


@pytest.fixture(scope="module")
def key(installed: Site) -> str:
    """An API key: the routers listen on more than loopback, so nobody gets in without."""
    made = installed.hosts["one"].checked("stoker key create team --json")
    return str(json.loads(made)["token"])


@pytest.fixture(scope="module")
def model(installed: Site) -> str:
    """A model of which there is one replica at most."""
    spec = {
        "name": "tiny",
        "source": "none",
        "engine": "stub",
        "device_memory_bytes": "1GiB",
        "idle_s": 3600,
    }
    one = installed.hosts["one"]
    one.checked(f"echo '{json.dumps(spec)}' > /root/tiny.json && stoker model add /root/tiny.json")
    return "tiny"


def call(host: Machine, key: str, model: str, timeout_s: float = 60) -> str:
    """One call by a connection of its own through the router there; what is wrong, or ''."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://{host.address}:8080/v1/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            said = json.load(answer)
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read()[:300]!r}"
    except (OSError, ValueError) as error:
        return repr(error)
    right = said["model"] == model and said["choices"][0]["message"]["content"]
    return "" if right else repr(said)


def test_a_model_is_called_through_each_router(installed: Site, key: str, model: str) -> None:
    for name in ROLES["router"]:
        assert call(installed.hosts[name], key, model) == ""
