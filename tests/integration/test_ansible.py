"""The playbook, applied for real to a fresh Debian: what it writes, that it settles, that it runs.

It takes about two minutes, root, debootstrap and a Debian mirror; without, it skips and says so.
systemd itself does not run here: the units are verified by its own tools, and their commands are
started as they say. Restarts by systemd and its sandbox are not exercised.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import tomllib

import pytest

from tests.kits.ansible_root import CannotMake, Root, fill, missing
from tests.kits.checkout import ROOT

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"Ansible's test host: {missing()}"),
    pytest.mark.timeout(600),
]

INVENTORY = """
all:
  vars: {ansible_connection: local, ansible_python_interpreter: /usr/bin/python3}
  children:
    consul: {hosts: {one: }}
    scheduler: {hosts: {one: }}
    router: {hosts: {one: }}
    agent: {hosts: {one: }}
"""
SETTINGS = {
    "stoker_cluster_token": 'a-test\'s "own" token, 0123',
    "stoker_pip_args": "--no-index --find-links /wheelhouse",
    "stoker_engine": "none",
    "stoker_manage_services": False,
    "stoker_engine_ports": "20000-20099",
    "stoker_agent": {"devices": "simulated:1x8GiB", "labels": {"rack": "r7"}},
}
RECAP = re.compile(r"^one\s+: (.*)$", re.MULTILINE)


def play(root: Root, *options: str, **settings: object) -> tuple[dict[str, int], str]:
    """The counts of the recap (ok, changed, failed …) and the whole output.

    The operator's umask is the strictest there is, as on a hardened host.
    """
    variables = json.dumps(SETTINGS | settings)
    command = "cd /src/ansible && exec /ansible/bin/ansible-playbook -i /src/inventory.yml site.yml"
    done = root.run("bash", "-c", f'umask 077 && {command} -e "$@"', "play", variables, *options)
    found = RECAP.search(done.stdout)
    assert found, done.stdout[-3000:]
    counts = {k: int(v) for k, v in (pair.split("=") for pair in found[1].split())}
    return counts, done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A Debian with Ansible in it, and nothing of Stoker or Consul."""
    folder = tmp_path_factory.mktemp("debian")
    root = Root(folder / "root")
    try:
        root.make()
    except CannotMake as error:
        pytest.skip(f"no Debian to try the playbook on: {error}")
    fill(root, folder)
    (root.path / "src/inventory.yml").write_text(INVENTORY)
    return root


@pytest.fixture(scope="module")
def checked_bare(bare: Root) -> tuple[dict[str, int], str]:
    """Check mode before anything is installed, Consul included."""
    return play(bare, "--check", stoker_manage_services=True)


@pytest.fixture(scope="module")
def refused(bare: Root, checked_bare: object) -> dict[str, str]:
    """What the playbook says where it can do nothing."""
    return {
        "known token": play(bare, stoker_cluster_token="change-me")[1],
        "no consul": play(bare)[1],
    }


@pytest.fixture(scope="module")
def applied(bare: Root, refused: dict[str, str]) -> Root:
    """The same, after the playbook."""
    try:
        bare.checked("bash", "/src/scripts/install_consul.sh")
    except CannotMake as error:
        pytest.skip(f"no Consul for the test host: {error}")
    counts, output = play(bare)
    assert counts["failed"] == 0, output[-3000:]
    assert counts["changed"] > 10
    return bare


def mode(root: Root, path: str) -> tuple[str, str]:
    """(rwx mode in octal, owner:group by name inside the root)."""
    found = (root.path / path).lstat()
    names = {}
    for kind in ("passwd", "group"):
        for line in (root.path / "etc" / kind).read_text().splitlines():
            name, _, number, *_ = line.split(":")
            names[kind, int(number)] = name
    owner = f"{names['passwd', found.st_uid]}:{names['group', found.st_gid]}"
    return oct(stat.S_IMODE(found.st_mode)), owner


def test_check_mode_works_on_a_host_without_consul(
    checked_bare: tuple[dict[str, int], str],
) -> None:
    counts, output = checked_bare
    assert counts["failed"] == 0, output[-3000:]
    assert counts["changed"] > 5


def test_what_cannot_work_is_refused_in_words(refused: dict[str, str]) -> None:
    assert "stoker_cluster_token must be one long random text" in refused["known token"]
    assert "set stoker_consul_url to a Consul that runs already" in refused["no consul"]


def test_a_second_run_changes_nothing(applied: Root) -> None:
    counts, output = play(applied)
    assert (counts["changed"], counts["failed"]) == (0, 0), output[-3000:]


def test_files_have_their_owners_and_modes(applied: Root) -> None:
    assert mode(applied, "etc/stoker") == ("0o750", "root:stoker")
    assert mode(applied, "etc/stoker/stoker.toml") == ("0o640", "root:stoker")
    assert mode(applied, "etc/consul.d/stoker.json") == ("0o640", "root:consul")
    assert mode(applied, "var/lib/stoker") == ("0o750", "stoker:stoker")
    assert mode(applied, f"opt/stoker/{release(applied)}/bin/stoker") == ("0o755", "root:root")


def release(root: Root) -> str:
    """Which release is in use, as a path below /opt/stoker."""
    target = (root.path / "opt/stoker/venv").readlink()
    return str(target.relative_to("/opt/stoker"))


def test_the_settings_are_what_was_asked_for(applied: Root) -> None:
    settings = tomllib.loads((applied.path / "etc/stoker/stoker.toml").read_text())
    assert settings["cluster_token"] == SETTINGS["stoker_cluster_token"]
    assert settings["registry"] == {"consul_url": "http://127.0.0.1:8500"}
    assert settings["router"]["host"] == "127.0.0.1"  # a single host talks to itself only
    assert settings["agent"] == {
        "node_id": "one",
        "host": "127.0.0.1",
        "port": 8082,
        "engine_ports": "20000-20099",
        "devices": "simulated:1x8GiB",
        "labels": {"rack": "r7"},
    }


def test_the_units_are_enabled_and_sound(applied: Root) -> None:
    units = [f"stoker-{part}.service" for part in ("scheduler", "router", "agent")]
    wants = applied.path / "etc/systemd/system/multi-user.target.wants"
    assert {*units, "consul.service"} <= {link.name for link in wants.iterdir()}
    paths = [f"/etc/systemd/system/{unit}" for unit in units]
    done = applied.run("systemd-analyze", "verify", "--man=no", *paths)
    assert (done.returncode, done.stdout) == (0, "")
    # The parts that need nothing of the host are shut in well: 0 is best, 10 is worst.
    for unit in units[:2]:
        check = ("systemd-analyze", "security", "--offline=yes", "--threshold=20", unit)
        done = applied.run(*check)
        assert done.returncode == 0, done.stdout


def test_engines_outlive_the_agent_by_what_its_unit_says(applied: Root) -> None:
    text = (applied.path / "etc/systemd/system/stoker-agent.service").read_text()
    lines = set(text.splitlines())
    assert {
        "KillMode=process",
        "KillSignal=SIGTERM",
        "ExecReload=/bin/kill -USR1 $MAINPID",
        "Restart=always",
        "Delegate=yes",
        "OOMPolicy=continue",
        "TimeoutStopSec=120",  # above the 60 s that requests may take to end
    } <= lines
    assert not {"PrivateTmp=yes", "PrivateDevices=yes"} & lines


def test_the_services_start_serve_hand_over_and_end(applied: Root) -> None:
    script = ROOT / "tests/kits/ansible_services.py"
    shutil.copy(script, applied.path / "src/services.py")
    done = applied.run("python3", "/src/services.py", network=False)
    assert done.returncode == 0, done.stdout[-6000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["health"].keys() == {"scheduler", "router", "agent"}
    assert '"one"' in json.dumps(result["nodes"])
    before, left, after, at_the_end = result["engines"]
    assert before
    assert before == left == after  # SIGUSR1 ended the agent alone, and the next one adopted them
    assert result["detached"] == 0
    assert at_the_end == []  # SIGTERM ended them with the agent
    assert result["stopped"] == {"agent": 0, "router": 0, "scheduler": 0}


def test_a_changed_setting_changes_one_file(applied: Root) -> None:
    counts, output = play(applied, stoker_log_format="text")
    assert (counts["changed"], counts["failed"]) == (1, 0), output[-3000:]


def test_an_upgrade_leaves_the_release_that_engines_run_from(applied: Root) -> None:
    old = release(applied)
    lock = applied.path / "src/requirements/base.txt"
    before = lock.read_text()
    lock.write_text(before + "# another release\n")
    counts, output = play(applied)
    assert counts["failed"] == 0, output[-3000:]
    assert release(applied) != old
    assert (applied.path / "opt/stoker" / old / "bin/stoker").exists()
    lock.write_text(before)
    play(applied)  # back to the older one: only the link moves
    assert release(applied) == old
