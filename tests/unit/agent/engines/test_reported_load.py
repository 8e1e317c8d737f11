"""What is read of an engine's own metrics: vLLM's text, and the stub's."""

from __future__ import annotations

import pytest

from agent.engines.reported_load import EngineLoad, read_load
from runtime.engine.guard import Activity
from runtime.engine.stub.adapters import StubAdapters
from runtime.engine.stub.api import Api
from runtime.engine.stub.engine import StubArgs

VLLM = """\
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
# HELP vllm:num_requests_waiting_by_reason of those, by reason
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 1.0
"""


def test_the_fullest_cache_and_all_who_wait_count():
    assert read_load(VLLM) == EngineLoad(kv_cache_usage=0.75, waiting=4)


def test_an_engine_that_does_not_say():
    assert read_load("# TYPE up gauge\nup 1\n") == EngineLoad()


def test_what_is_no_metrics_is_an_error():
    with pytest.raises(ValueError, match="could not convert"):
        read_load('vllm:num_requests_waiting{engine="0"} many\n')


def test_the_stub_fills_its_modelled_cache():
    activity = Activity()
    for _ in range(5):
        activity.begin()
    api = Api(("m",), StubArgs(kv_requests=4), StubAdapters(None))
    assert read_load(api.metrics(activity, 0)) == EngineLoad(kv_cache_usage=1.0, waiting=1)
    api = Api(("m",), StubArgs(kv_requests=10), StubAdapters(None))
    assert read_load(api.metrics(activity, 0)) == EngineLoad(kv_cache_usage=0.5, waiting=0)
