"""Consul's ACLs turned on, and off again, under a cluster that runs and is called."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.kits.hosts.callers import Callers, call
from tests.kits.hosts.machines import Machine, Machines
from tests.kits.hosts.playbook import SETTINGS, Site, wheels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MANAGEMENT = str(uuid.uuid4())
ACLS_ON: dict[str, Any] = {"consul_management_token": MANAGEMENT}
PARTS = {"one": ["scheduler", "router"], "two": ["scheduler", "agent"], "three": []}
# A PUT of Consul's sessions with $TOKEN; the base root has no curl.
PUT = (
    "python3 -c 'import sys, urllib.request as u; print(u.urlopen(u.Request(sys.argv[2],"
    ' method="PUT", headers={"X-Consul-Token": sys.argv[1]})).read().decode())\' $TOKEN'
    " http://127.0.0.1:8500/v1/session"
)
WRITE = "consul kv put stoker/models/mine {}"


@pytest.fixture(scope="module")
def site(fleet: Machines, wheel: Path) -> Site:
    """Three hosts, each a Consul server, installed without ACLs."""
    hosts = {name: fleet.boot(name, wheels()) for name in PARTS}
    groups = {"consul": list(hosts.values())}
    for part in ("scheduler", "router", "agent"):
        groups[part] = [hosts[name] for name, parts in PARTS.items() if part in parts]
    site = Site(fleet.folder / "site", fleet.key, groups, **SETTINGS, stoker_wheel=str(wheel))
    site.play().succeeded()
    return site


@pytest.fixture(scope="module")
def key(site: Site) -> str:
    one = site.hosts["one"]
    model = {"name": "tiny", "source": "none", "engine": "stub", "device_memory_bytes": "1GiB"}
    one.checked(f"echo '{json.dumps(model)}' > /root/m.json && stoker model add /root/m.json")
    key = str(json.loads(one.checked("stoker key create team --json"))["token"])
    assert call(one.address, key, "tiny") == ""
    return key


def played_under_load(site: Site, key: str, **settings: Any) -> Callers:
    """Ten calls a second meanwhile; the engine that answers them is the same before and after."""
    engine = site.hosts["two"].checked("pgrep -f '[r]untime.engine.stub'")
    with Callers([site.hosts["one"].address], key, "tiny", per_second=10, timeout_s=30) as callers:
        played = site.play(**settings).succeeded()
    assert site.hosts["two"].checked("pgrep -f '[r]untime.engine.stub'") == engine
    print(f"{settings}: {played.took_s:.0f} s, changed={played.total('changed')}, {callers}")
    return callers


def tokens(host: Machine) -> set[str]:
    """The parts that have one there."""
    listed = host.run("cd /etc/stoker && ls *.env").stdout
    return {name.removesuffix(".env") for name in listed.split() if name.endswith(".env")}


def test_turned_on_in_two_runs_they_cost_no_call(site: Site, key: str) -> None:
    callers = played_under_load(site, key, **ACLS_ON, consul_default_policy="allow")
    assert callers.wrong == [], callers
    callers = played_under_load(site, key, **ACLS_ON)
    assert callers.wrong == [], callers
    for host in site.hosts.values():
        assert "Permission denied" in host.run(WRITE).stdout
        assert tokens(host) == set(PARTS[host.name])
    again = site.play(**ACLS_ON).succeeded()
    assert again.total("changed") == 0, again.output[-4000:]


@pytest.mark.parametrize("part", ["agent", "scheduler"])
def test_a_part_may_end_sessions_of_its_own_host_alone(site: Site, part: str) -> None:
    two = site.hosts["two"]
    for owner, ends in (("one", False), ("two", True)):
        made = site.hosts[owner].checked(f"TOKEN={MANAGEMENT}; {PUT}/create")
        own = f". /etc/stoker/{part}.env; TOKEN=$STOKER_REGISTRY_CONSUL_TOKEN"
        done = two.run(f"{own}; {PUT}/destroy/{json.loads(made)['ID']}")
        assert (done.returncode == 0) == ends, done.stdout
        assert ends or "403" in done.stdout, done.stdout


def test_turned_off_again_they_leave_no_token_behind(site: Site, key: str) -> None:
    callers = played_under_load(site, key)
    assert callers.wrong == [], callers
    for host in site.hosts.values():
        assert tokens(host) == set()
        host.checked(WRITE)
    assert "stoker/models/mine" in site.hosts["one"].checked("consul kv get -keys stoker/models/")
    site.hosts["one"].checked("consul kv delete stoker/models/mine")
