"""What of a spec reaches out of its engine, and what of the agent's environment reaches it."""

from __future__ import annotations

import pytest

from agent.engines.process import base_environment
from runtime.contract.engine_policy import ENGINE_ENV, dropped, node_problems, passed
from runtime.contract.schema import SchemaError
from runtime.contract.spec_file import parse_spec

BASE = {"name": "m", "source": "/m"}


def refused(**fields: object) -> list[tuple[str, str]]:
    with pytest.raises(SchemaError) as raised:
        parse_spec({**BASE, **fields})
    assert all(problem.fix for problem in raised.value.problems)
    return [(problem.field, problem.message) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("STOKER_ROUTE_KEY", "set by Stoker"),
        ("CUDA_VISIBLE_DEVICES", "set by Stoker"),
        ("VLLM_API_KEY", "set by Stoker"),
        ("VLLM_MEDIA_CONNECTOR", "set by Stoker"),
        ("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "set by Stoker"),
        ("HF_HUB_OFFLINE", "set by Stoker"),
        ("LD_PRELOAD", "which code"),
        ("PYTHONPATH", "which code"),
        ("PYTHONSTARTUP", "which code"),
        ("PATH", "which code"),
        ("VLLM_PLUGINS", "which code"),
        ("NCCL_NET_PLUGIN", "which code"),
    ],
)
def test_what_no_spec_may_set(name: str, words: str) -> None:
    ((field, message),) = refused(env={name: "1"})
    assert field == f"env.{name}"
    assert words in message


@pytest.mark.parametrize("name", ["", "a", "1A", "A=B", "A-B", "A\n", "A B", "\u00c4", "A" * 129])
def test_an_invalid_name(name: str) -> None:
    ((field, _),) = refused(env={name: "1"})
    assert field.startswith("env")


@pytest.mark.parametrize("value", [1, True, None, "a\0b", "x" * 4097])
def test_an_invalid_value(value: object) -> None:
    ((field, _),) = refused(env={"NCCL_DEBUG": value})
    assert field == "env.NCCL_DEBUG"


@pytest.mark.parametrize(
    "host", ["", "A.com", "a b", "http://a.com", "a.com/x", "*.com", "a.com\n", "-a", "a_b"]
)
def test_an_invalid_media_domain(host: str) -> None:
    ((field, _),) = refused(media_domains=[host])
    assert field == "media_domains[0]"


def test_a_spec_says_and_a_node_allows() -> None:
    spec = parse_spec(
        {**BASE, "env": {"NCCL_P2P_DISABLE": "1", "MY_KNOB": "x"},
         "media_domains": ["img.example.com", "10.0.0.7", "127.0.0.1"]}
    )  # fmt: skip
    fields = [(p.field, p.value) for p in node_problems(spec, ENGINE_ENV, ())]
    assert fields == [
        ("env.MY_KNOB", None), ("media_domains", "img.example.com"),
        ("media_domains", "10.0.0.7"), ("media_domains", "127.0.0.1"),
    ]  # fmt: skip
    some = node_problems(spec, (*ENGINE_ENV, "MY_*"), ("*.example.com", "10.0.0.7"))
    assert [p.value for p in some] == ["127.0.0.1"]
    wild = node_problems(spec, ("*",), ("*",))
    assert [p.value for p in wild] == ["10.0.0.7", "127.0.0.1"], "an address is written out"


def test_the_values_of_variables_are_in_no_problem() -> None:
    spec = parse_spec({**BASE, "env": {"MY_SECRET": "s3cret"}})
    assert "s3cret" not in str(node_problems(spec, (), ()))


def test_a_spec_with_another_environment_is_another_launch() -> None:
    specs = [
        parse_spec({**BASE, **fields})
        for fields in ({}, {"env": {"NCCL_DEBUG": "INFO"}}, {"media_domains": ["a.com"]})
    ]
    assert len({spec.launch_key() for spec in specs}) == 3


def test_what_engines_get_of_the_agents_environment() -> None:
    environ = {
        "NCCL_P2P_DISABLE": "1", "VLLM_ATTENTION_BACKEND": "X", "PATH": "/bin", "HOME": "/root",
        "VLLM_API_KEY": "s", "CUDA_VISIBLE_DEVICES": "1", "LD_PRELOAD": "/evil.so",
        "OMP_NUM_THREADS": "2", "STOKER_CLUSTER_TOKEN": "s", "MY_KNOB": "x", "TRITON_X": "1",
    }  # fmt: skip
    assert passed(environ, ENGINE_ENV) == {"NCCL_P2P_DISABLE": "1", "VLLM_ATTENTION_BACKEND": "X"}
    kept = base_environment(environ, (*ENGINE_ENV, "MY_*", "STOKER_*"))
    assert sorted(kept) == [
        "HOME", "MY_KNOB", "NCCL_P2P_DISABLE", "PATH", "VLLM_ATTENTION_BACKEND",
    ]  # fmt: skip


def test_what_was_meant_for_engines_and_does_not_reach_them_is_named() -> None:
    environ = {
        "NCCL_P2P_DISABLE": "1", "VLLM_API_KEY": "s", "CUDA_VISIBLE_DEVICES": "1", "HOME": "/",
        "OMP_NUM_THREADS": "2", "TRITON_CACHE_DIR": "/x", "STOKER_CLUSTER_TOKEN": "s",
    }  # fmt: skip
    assert dropped(environ, ENGINE_ENV) == [
        "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_CACHE_DIR", "VLLM_API_KEY",
    ]  # fmt: skip
    assert "NCCL_P2P_DISABLE" in dropped(environ, ())
