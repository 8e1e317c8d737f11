"""Configuration: file, environment, overrides, and what a refusal says."""

from __future__ import annotations

import json

import pytest

from runtime.contract.config import load
from runtime.contract.schema import SchemaError


def test_environment_wins_over_the_file_and_overrides_win_over_both(tmp_path) -> None:
    path = tmp_path / "stoker.toml"
    path.write_text(
        'state_dir = "/s"\n[router]\nport = 1\nmax_body_bytes = "1MiB"\n[scheduler]\nport = 2\n'
    )
    environ = {"STOKER_ROUTER_PORT": "3", "STOKER_CLUSTER_TOKEN": "t" * 16, "UNRELATED": "x"}
    config = load(path, environ, {"scheduler.port": 4, "agent.node_id": "n"})
    assert (config.router.port, config.scheduler.port, config.state_dir) == (3, 4, "/s")
    assert config.router.max_body_bytes == 2**20
    assert config.cluster_token == "t" * 16
    assert config.node_id() == "n"
    assert str(config.registry_file()) == "/s/registry.db"


def test_the_file_may_be_named_by_the_environment(tmp_path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[agent]\nport = 7\n")
    assert load(environ={"STOKER_CONFIG": str(path)}).agent.port == 7


def test_every_bad_key_is_named(tmp_path) -> None:
    path = tmp_path / "stoker.toml"
    path.write_text(
        'log_format = "xml"\n[routr]\n[router]\nport = 70000\n[agent]\ndevises = "cpu"\n'
    )
    with pytest.raises(SchemaError) as caught:
        load(path, {"STOKER_SCHEDULER_PORT": "eighty"})
    found = {p.field: str(p) for p in caught.value.problems}
    assert "did you mean 'router'?" in found["routr"]
    assert "70000" in found["router.port"]
    assert "did you mean 'devices'?" in found["agent.devises"]
    assert "'eighty'" in found["scheduler.port"]
    assert "log_format" in found


def test_a_file_that_is_not_toml_is_named(tmp_path) -> None:
    path = tmp_path / "stoker.toml"
    path.write_text("port: 1")
    with pytest.raises(SchemaError, match=r"stoker\.toml: is not valid TOML"):
        load(path, {})


@pytest.mark.parametrize("name", ["cluster_token", "metrics_token"])
@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ("x", "has 1 characters, fewer than 16"),
        ("fifteen letters", "has 15 characters, fewer than 16"),
        ("sixteen letters\n", "can't be sent in a header"),
        (" a long enough one", "can't be sent in a header"),
        ("ein langer Schlüssel", "can't be sent in a header"),
    ],
)
def test_an_invalid_secret_is_refused_and_not_told(tmp_path, name, secret, words) -> None:
    path = tmp_path / "stoker.toml"
    path.write_text(f"{name} = {json.dumps(secret)}\n", encoding="utf-8")
    for load_it in (lambda: load(path, {}), lambda: load(None, {f"STOKER_{name.upper()}": secret})):
        with pytest.raises(SchemaError) as raised:
            load_it()
        assert f"{name}: {words}" in str(raised.value)
        assert "openssl rand -hex 32" in str(raised.value)
        assert "got" not in str(raised.value)


def test_no_secret_is_one_that_is_left_out() -> None:
    assert load(None, {}).cluster_token == ""


@pytest.mark.parametrize(
    "name", ["STOKER_ROUTER_PROT", "STOKER_AGENT_ENGINE_ENVS", "STOKER_CACHE_X"]
)
def test_a_variable_that_is_no_setting_does_not_vanish(name: str) -> None:
    with pytest.raises(SchemaError) as raised:
        load(None, {name: "1"})
    (problem,) = raised.value.problems
    assert (problem.field, problem.message) == (name, "is not a setting")
    assert problem.value is None, "it may be a secret"


def test_variables_that_are_not_settings_are_let_be() -> None:
    odd = {"STOKER_ROUTER": "http://r", "STOKER_ROUTER_WORKER": "1", "STOKER_DEBUG": "1"}
    assert load(None, odd) == load(None, {})


def test_a_list_in_the_environment_is_written_with_commas() -> None:
    config = load(
        None, {"STOKER_AGENT_ENGINE_ENV": "NCCL_*, MY_KNOB", "STOKER_AGENT_MEDIA_DOMAINS": ""}
    )
    assert config.agent.engine_env == ("NCCL_*", "MY_KNOB")
    assert config.agent.media_domains == ()


@pytest.mark.parametrize("network", ["nginx", "10.0.0.1/8", "10.0.0.0/33"])
def test_a_proxy_is_named_by_its_address_or_network(network: str) -> None:
    with pytest.raises(SchemaError, match=r"router\.trusted_proxies: .*10\.0\.0\.0/8"):
        load(environ={"STOKER_ROUTER_TRUSTED_PROXIES": f"127.0.0.1, {network}"})
    config = load(environ={"STOKER_ROUTER_TRUSTED_PROXIES": "127.0.0.1, fd00::/8"})
    assert config.router.trusted_proxies == ("127.0.0.1", "fd00::/8")
