"""What the playbook's rules let a part do in a real Consul: enough, and no more."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from runtime.registry.consul import ConsulRegistry
from runtime.registry.protocol import RegistryError
from tests.kits.checkout import ROOT
from tests.kits.consul_server import MISSING, bootstrap_token, consul_is_installed, consul_server
from tests.kits.registry_services import service

pytestmark = [
    pytest.mark.consul,
    pytest.mark.skipif(not consul_is_installed(), reason=MISSING),
]

RULES = yaml.safe_load((ROOT / "ansible/roles/consul/vars/main.yml").read_text())["consul_rules"]
NODE = "test"  # as consul_server names it
TTL_S = 10

Token = Callable[[str, str], str]


def call(url: str, token: str, method: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"X-Consul-Token": token}, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture
def consul() -> Iterator[str]:
    with consul_server(acl=True) as url:
        yield url


@pytest.fixture
def token(consul: str) -> Token:
    """A token with a part's rules, as the playbook makes it for a host."""
    management = bootstrap_token(consul)

    def make(part: str, node: str) -> str:
        rules = RULES[part] + f'session "{node}" {{ policy = "write" }}\n'
        name = f"{part}-{node}"
        acl = f"{consul}/v1/acl"
        call(f"{acl}/policy", management, "PUT", {"Name": name, "Rules": rules})
        made = call(f"{acl}/token", management, "PUT", {"Policies": [{"Name": name}]})
        return str(made["SecretID"])

    return make


async def test_a_scheduler_leads_with_the_token_of_its_host(consul: str, token: Token) -> None:
    registry = ConsulRegistry(consul, token("scheduler", NODE))
    lock = await registry.acquire("stoker/leader", b"me", TTL_S)
    assert lock is not None
    await lock.renew()
    assert lock.held
    await registry.register(service("stoker-scheduler"), TTL_S)
    await lock.release()
    await registry.close()


async def test_an_agent_takes_leases_with_the_token_of_its_host(consul: str, token: Token) -> None:
    registry = ConsulRegistry(consul, token("agent", NODE))
    lock = await registry.acquire("stoker/cache/leases/x", b"me", TTL_S)
    assert lock is not None
    await lock.renew()
    assert lock.held
    with pytest.raises(RegistryError, match="Permission denied"):
        await registry.acquire("stoker/leader", b"me", TTL_S)
    await lock.release()
    await registry.close()


@pytest.mark.parametrize("part", ["agent", "scheduler", "router"])
async def test_no_part_of_another_host_ends_the_leaders_session(
    consul: str, token: Token, part: str
) -> None:
    registry = ConsulRegistry(consul, token("scheduler", NODE))
    lock = await registry.acquire("stoker/leader", b"me", TTL_S)
    assert lock is not None
    entry = f"{consul}/v1/kv/stoker/leader"
    [told] = call(entry, token("agent", "another"), "GET")  # anyone may see which one it is
    theirs = token(part, "yet-another")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        call(f"{consul}/v1/session/destroy/{told['Session']}", theirs, "PUT")
    await lock.renew()
    assert lock.held
    await lock.release()
    await registry.close()
