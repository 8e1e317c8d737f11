"""A release with vLLM's CPU build, installed by the playbook on a clean Debian, and called."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.tiny_models import write_model
from tests.kits.hosts.machines import Machine, Machines
from tests.kits.hosts.playbook import SETTINGS, Site, wheels

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1800)]

START_S = 600  # a first start compiles the model, on two busy cores


@pytest.fixture(scope="module")
def hosts(
    fleet: Machines, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Machine]:
    """`front` has Consul, scheduler and router, `engines` an agent with vLLM; both installed."""
    models = tmp_path_factory.mktemp("models")
    write_model(models, "tiny")
    models.chmod(0o755)  # the agent's user has to get in
    front = fleet.boot("front", wheels("cpu"))
    engines = fleet.boot("engines", wheels("cpu"), f"--bind-ro={models}:/srv/models")
    groups = {"consul": [front], "scheduler": [front], "router": [front], "agent": [engines]}
    settings = {
        **SETTINGS,
        "stoker_wheel": str(wheel),
        "stoker_engine": "cpu",
        "stoker_agent": {"devices": "cpu:6GiB"},
    }
    played = Site(fleet.folder / "site", fleet.key, groups, **settings).play().succeeded()
    print(f"installed in {played.took_s:.0f} s")
    return {"front": front, "engines": engines}


def test_only_the_agents_host_has_the_engine(hosts: dict[str, Machine]) -> None:
    installed = "ls -d /opt/stoker/venv/lib/python3*/site-packages/vllm"
    hosts["engines"].checked(installed)
    assert hosts["front"].run(installed).returncode != 0


def test_a_call_through_the_router_gets_the_engines_tokens(hosts: dict[str, Machine]) -> None:
    front = hosts["front"]
    spec = {"name": "tiny", "source": "/srv/models/tiny", "engine_args": {"max_model_len": 256}}
    front.checked(f"echo '{json.dumps(spec)}' > /root/tiny.json")
    front.checked("stoker model add /root/tiny.json")
    key = json.loads(front.checked("stoker key create team --json"))["token"]
    began = time.monotonic()
    try:
        cold = completion(front.address, key)
    except AssertionError:
        for command in ("stoker ps", "stoker devices", "stoker decisions"):
            print(front.run(command).stdout)
        print(hosts["engines"].run("tail -n 60 /var/lib/stoker/logs/*").stdout[-6000:])
        print(hosts["engines"].logs("stoker-agent", 40))
        raise
    cold_s = time.monotonic() - began
    began = time.monotonic()
    warm = completion(front.address, key)
    warm_s = time.monotonic() - began
    print(f"first answer after {cold_s:.1f} s, the second after {warm_s:.2f} s")
    assert cold["model"] == "tiny"
    assert cold["usage"]["completion_tokens"] == 8
    assert cold["choices"][0]["text"] == warm["choices"][0]["text"] != ""  # of one seed, greedily
    [replica] = json.loads(front.checked("stoker ps --json"))["replicas"]
    assert (replica["state"], replica["node_id"]) == ("ready", "engines")
    assert "vllm" in hosts["engines"].checked(f"cat /proc/{replica['pid']}/cmdline | tr '\\0' ' '")


def test_the_host_lacks_nothing_that_compiling_takes(hosts: dict[str, Machine]) -> None:
    said = hosts["engines"].checked("journalctl --no-pager -o cat -u stoker-agent")
    assert "vLLM compiles parts of a model" not in said


def completion(address: str, key: str) -> dict[str, Any]:
    """The answer to one prompt, eight tokens long and always the same."""
    body = {"model": "tiny", "prompt": "one two three", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://{address}:8080/v1/completions",
        json.dumps(body | {"ignore_eos": True}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode()}") from None
