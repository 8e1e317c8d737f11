"""The playbook on three Debian hosts: Consul on all, two schedulers, two routers, two agents."""

from __future__ import annotations

import base64
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kits.hosts.callers import Callers, call
from tests.kits.hosts.machines import Machine, Machines
from tests.kits.hosts.playbook import SETTINGS, Site, make_wheel, wheels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROLES = {
    "consul": ("one", "two", "three"),
    "scheduler": ("one", "two"),
    "router": ("one", "two"),
    "agent": ("two", "three"),
}


# Until a caller has an answer from another host: the scheduler misses heartbeats for 10 s
# (scheduler.node_timeout_s), the stub starts in 1 s; Consul may elect another leader meanwhile.
SILENT_S = 30


@pytest.fixture(scope="module")
def site(fleet: Machines, wheel: Path) -> Site:
    hosts = {name: fleet.boot(name, wheels()) for name in ROLES["consul"]}
    groups = {role: [hosts[name] for name in names] for role, names in ROLES.items()}
    settings = {
        **SETTINGS,
        "stoker_wheel": str(wheel),
        "consul_encrypt_key": base64.b64encode(os.urandom(32)).decode(),
        "consul_management_token": str(uuid.uuid4()),
    }
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


WRITE_LEADER = "consul kv put stoker/leader mine"
WRITE_MODEL = "consul kv put stoker/models/mine {}"
WRITE_CACHE = "consul kv put stoker/cache/pins/mine 1"
READ_LEADER = "consul kv get stoker/leader"
READ_TOKENS = "consul kv get -keys stoker/tokens"
JOIN_AS = "consul services register -id mine -name stoker-"
LEAVE = "consul services deregister -id mine"


@pytest.mark.parametrize(
    ("who", "may"),
    [
        ("nobody", set()),
        ("cli", {READ_LEADER}),
        ("router", {READ_LEADER, f"{JOIN_AS}router"}),
        ("agent", {READ_LEADER, WRITE_CACHE, f"{JOIN_AS}agent"}),
    ],
)
def test_a_token_opens_what_its_part_needs_and_nothing_else(
    installed: Site, who: str, may: set[str]
) -> None:
    host = installed.hosts["two"]  # which has all of them
    refused = {WRITE_LEADER, WRITE_MODEL, f"{JOIN_AS}scheduler", WRITE_CACHE, f"{JOIN_AS}agent"}
    refused |= {READ_LEADER, f"{JOIN_AS}router"}
    token = {
        "nobody": "true",
        "cli": "export CONSUL_HTTP_TOKEN=$(sed -n 's/^consul_token = .\\(.*\\)./\\1/p'"
        " /etc/stoker/stoker.toml)",
    }.get(who, f". /etc/stoker/{who}.env; export CONSUL_HTTP_TOKEN=$STOKER_REGISTRY_CONSUL_TOKEN")
    for command in sorted(may):
        host.checked(f"{token}; {command}")
        if command.startswith(JOIN_AS):
            host.checked(f"{token}; {LEAVE}")
    for command in sorted(refused - may):
        said = host.run(f"{token}; {command}")
        assert said.returncode != 0, (command, said.stdout)
        assert "Permission denied" in said.stdout or "403" in said.stdout, (command, said.stdout)
    secret = host.run(f"{token}; {READ_TOKENS}")
    assert secret.stdout.strip() in ("", "Error! No key exists at: stoker/tokens"), secret.stdout


def test_no_part_finds_the_registry_open(installed: Site) -> None:
    for host in installed.hosts.values():
        said = host.checked("journalctl --no-pager -o cat -u 'stoker-*'")
        assert "ready at" in said
        assert "may be written by" not in said
        assert "no heartbeat" not in host.logs("stoker-agent", lines=5)
    for name in ("scheduler.env", "router.env", "agent.env"):
        mode = installed.hosts["two"].checked(f"stat -c '%a %U' /etc/stoker/{name}")
        assert mode.strip() == "600 root"


def test_gossip_is_encrypted(installed: Site) -> None:
    token = installed.settings["consul_management_token"]
    listed = installed.hosts["one"].checked(f"CONSUL_HTTP_TOKEN={token} consul keyring -list")
    assert str(installed.settings["consul_encrypt_key"]) in listed


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


def test_a_model_is_called_through_each_router(installed: Site, key: str, model: str) -> None:
    for name in ROLES["router"]:
        assert call(installed.hosts[name].address, key, model) == ""


def test_engines_listen_where_the_firewall_lets_routers_in(
    installed: Site, key: str, model: str
) -> None:
    assert call(installed.hosts["one"].address, key, model) == ""
    there = engines(installed, model)
    assert there
    for name in there:
        host = installed.hosts[name]
        pid = host.checked(f"pgrep -f '[r]untime.engine.stub.server .*--names {model} '").strip()
        listening = host.checked(f"ss -Hltnp | grep 'pid={pid},'").split()[3]
        assert 20000 <= int(listening.rpartition(":")[2]) <= 20099


def versions(site: Site) -> set[str]:
    said = [host.checked("stoker version --json") for host in site.hosts.values()]
    return {json.loads(text)["stoker"] for text in said}


def test_an_upgrade_and_the_way_back_lose_no_call(
    installed: Site, key: str, model: str, tmp_path: Path
) -> None:
    """Both routers are called all the time, by fresh connections of callers with 30 s patience."""
    before = versions(installed)
    routers = [installed.hosts[name].address for name in ROLES["router"]]
    for wheel, expected in (
        (make_wheel(tmp_path, version="0.1.1"), {"0.1.1"}),
        (installed.settings["stoker_wheel"], before),
    ):
        with Callers(routers, key, model, per_second=10, timeout_s=30) as callers:
            played = installed.play(stoker_wheel=str(wheel)).succeeded()
        assert versions(installed) == expected
        print(f"to {expected}: {played.took_s:.0f} s, {callers}")
        assert callers.wrong == [], callers
        assert callers.answered > 10 * played.took_s


def eventually(condition: Callable[[], object], what: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


# What a command and a scheduler say of that: the latter could not renew its lock.
WITHOUT_CONSUL = ("can't ask the registry", "the registry does not answer")


def said(site: Site, what: str, command: str) -> list[dict[str, object]]:
    """What `stoker` lists; nothing while Consul elects a leader of its own, as it must where the
    silent host was that, and again when that one is back."""
    done = site.hosts["one"].run(f"stoker {command} --json")
    if done.returncode:
        assert any(words in done.stdout for words in WITHOUT_CONSUL), done.stdout
        return []
    return list(json.loads(done.stdout)[what])


def replicas(site: Site, model: str) -> list[tuple[object, object]]:
    """Where the leader has it, and in which state."""
    found = said(site, "replicas", "ps")
    return [(each["node_id"], each["state"]) for each in found if each["model"] == model]


def node_states(site: Site) -> dict[object, object]:
    return {node["node_id"]: node["state"] for node in said(site, "nodes", "nodes")}


def engines(site: Site, model: str) -> list[str]:
    """The hosts on which a process of it really runs."""
    # The brackets: the shell that looks holds the pattern itself.
    look = f"pgrep -f '[r]untime.engine.stub.server .*--names {model} ' | wc -l"
    return [n for n in ROLES["agent"] for _ in range(int(site.hosts[n].checked(look)))]


def test_a_host_that_falls_silent_is_replaced_and_comes_back(
    installed: Site, key: str, model: str
) -> None:
    """Nobody is told: its packets just go nowhere, those of its Consul server too."""
    one, lost = installed.hosts["one"], installed.hosts["three"]
    one.checked(f"stoker unload {model} && stoker cordon two")
    assert call(one.address, key, model) == ""
    one.checked("stoker uncordon two")
    assert replicas(installed, model) == [("three", "ready")]

    routers = [installed.hosts[name].address for name in ROLES["router"]]
    with Callers(routers, key, model, per_second=5, timeout_s=60) as callers:
        time.sleep(2)
        lost.unplug()
        try:
            cut = time.monotonic()
            eventually(lambda: ("two", "ready") in replicas(installed, model), "no replica on two")
            took_s = time.monotonic() - cut
            time.sleep(5)
        finally:
            lost.plug()
    print(f"ready elsewhere after {took_s:.1f} s; {callers}")
    assert callers.wrong == [], callers
    assert callers.slowest_s < SILENT_S, callers

    eventually(lambda: engines(installed, model) == ["two"], "it runs twice", within_s=90)
    on_two, both_ready = [("two", "ready")], dict.fromkeys(ROLES["agent"], "ready")
    eventually(lambda: replicas(installed, model) == on_two, "the leader sees it otherwise")
    eventually(lambda: node_states(installed) == both_ready, "a node is not ready again")
    for address in routers:
        assert call(address, key, model) == ""
