"""The playbook on one clean Debian with real systemd: every service really started, run twice."""

from __future__ import annotations

import base64
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.kits.hosts.machines import Machine, Machines
from tests.kits.hosts.playbook import SETTINGS, Site, make_wheel, wheels

pytestmark = pytest.mark.timeout(900)

GROUPS = ("consul", "scheduler", "router", "agent")


@pytest.fixture(scope="module")
def site(fleet: Machines, wheel: Path) -> Site:
    one = fleet.boot("one", wheels())
    # The package's Consul fails there, without a private address. Where a start takes seconds it is
    # still being started again when the playbook comes: then as many starts have been enough.
    drop_in = "/etc/systemd/system/consul.service.d"
    limit = "[Unit]\\nStartLimitIntervalSec=1h\\nStartLimitBurst=5"
    one.checked(f"mkdir -p {drop_in} && printf '{limit}\\n' > {drop_in}/slow.conf")
    one.checked("systemctl daemon-reload")
    one.run("for i in 1 2 3 4 5 6; do systemctl start consul; sleep 1; done")
    assert one.run("systemctl start consul").returncode != 0
    settings = {**SETTINGS, "stoker_wheel": str(wheel)}
    return Site(fleet.folder / "site", fleet.key, {group: [one] for group in GROUPS}, **settings)


@pytest.fixture(scope="module")
def one(site: Site) -> Machine:
    """The host after the playbook."""
    site.play().succeeded()
    return site.hosts["one"]


ACLS = {
    "consul_management_token": str(uuid.uuid4()),
    "consul_encrypt_key": base64.b64encode(os.urandom(32)).decode(),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, ACLS], ids=["open", "acls"])
def test_check_mode_works_on_a_fresh_host(site: Site, settings: dict[str, Any]) -> None:
    assert site.play("--check", **settings).succeeded().total("changed") > 5


def test_every_service_runs_and_a_second_run_changes_nothing(site: Site, one: Machine) -> None:
    assert not (units := inactive(one)), units
    again = site.play().succeeded()
    assert again.total("changed") == 0, again.output[-4000:]


@pytest.mark.slow
def test_check_mode_has_nothing_to_change_afterwards(site: Site, one: Machine) -> None:
    checked = site.play("--check").succeeded()
    assert checked.total("changed") == 0, checked.output[-4000:]


def inactive(host: Machine) -> list[str]:
    names = ["consul", "stoker-scheduler", "stoker-router.socket", "stoker-router", "stoker-agent"]
    return [
        f"{name}: {host.logs(name)}"
        for name in names
        if host.run(f"systemctl is-active {name}").stdout.strip() != "active"
    ]


def test_stoker_is_on_the_path_and_finds_the_cluster(one: Machine) -> None:
    assert '"one"' in one.checked("stoker nodes --json")


def test_router_and_scheduler_have_a_memory_limit(one: Machine) -> None:
    for part, limit in (("router", 4 * 2**30), ("scheduler", 2 * 2**30)):
        said = one.checked(f"systemctl show -P MemoryMax stoker-{part}").strip()
        assert said == str(limit)


@pytest.mark.slow
def test_a_play_fails_where_consul_knows_no_such_token(site: Site, one: Machine) -> None:
    """All parts are alive then, and reach nobody."""
    unknown: dict[str, Any] = {
        "consul_agent_token": str(uuid.uuid4()),
        "stoker_consul_token": str(uuid.uuid4()),
    }
    refused = site.play(stoker_ready_tries=4, **unknown)
    assert refused.status != 0
    assert "does not see a leader that hears all 1" in refused.output, refused.output[-4000:]
    site.play().succeeded()


@pytest.mark.slow
def test_old_releases_go_those_in_use_stay(site: Site, one: Machine, tmp_path: Path) -> None:
    """After three upgrades in a row; a process that an engine could be runs from the first one."""
    link = "readlink -f /opt/stoker/venv"
    seen = [one.checked(link).strip()]
    one.checked(f"systemd-run --unit=holds {seen[0]}/bin/python -c 'import time; time.sleep(3600)'")
    for number in (1, 2, 3):
        upgrade(site, tmp_path, f"0.1.{number}")
        seen.append(one.checked(link).strip())
    assert len(set(seen)) == 4
    assert releases(one) == {seen[0], seen[2], seen[3]}
    assert not (units := inactive(one)), units
    one.checked("systemctl stop holds")
    site.play(stoker_keep_releases=1).succeeded()  # back to the first
    assert one.checked(link).strip() == seen[0]
    assert releases(one) == {seen[0], seen[3]}
    upgrade(site, tmp_path, "0.1.4")  # the one before is the oldest now, and stays
    assert releases(one) == {seen[0], one.checked(link).strip()}


def upgrade(site: Site, folder: Path, version: str) -> None:
    wheel = make_wheel(folder / version, version=version)
    site.play(stoker_wheel=str(wheel), stoker_keep_releases=1).succeeded()


def releases(host: Machine) -> set[str]:
    return set(host.checked("ls -d /opt/stoker/releases/*").split())


def test_the_removal_leaves_nothing_running(site: Site, one: Machine) -> None:
    site.play(book="remove.yml").succeeded()
    assert one.run("ls /etc/systemd/system/stoker-*").returncode != 0
    assert one.run("pgrep -u stoker").stdout == ""
    assert one.run("command -v stoker").returncode != 0
