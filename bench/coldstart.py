"""From cold to the first token: plain vLLM against Stoker, real vLLM on CPU, in the same run.

    python bench/coldstart.py [--quick] [--json]

The baseline is `python -m vllm.entrypoints.openai.api_server` with the very arguments and
environment that Stoker uses: process start, health polled every 20 ms, then one streamed request.
Ours is one streamed request to the router of a running `stoker up` while the model is cold. The two
alternate; each figure is the median of its rounds. --quick: one round of the tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from agent.process import base_environment, free_port
from bench.lib.report import Row, print_report
from runtime.engine import LaunchContext, get_engine
from runtime.footprint import estimate
from runtime.tiny_models import write_model
from runtime.wire import ModelSpec

ROOT = Path(__file__).parents[1]
ROUNDS = 5
DEADLINE_S = 300.0
MIB = 2**20
LABELS = {  # of the specs: what it is, and the ratio to reach
    "tiny": ("tiny, eager", "<= 0.083"),  # 12 times as fast
    "big": ("438 MB, eager", "<= 0.125"),  # 8 times
    "compiled": ("438 MB, torch.compile, not the first start", "<= 0.2"),  # 5 times
}


class Start(NamedTuple):
    """One cold start."""

    first_token_s: float
    pss_bytes: int  # of the engine's processes


def wait(condition: Callable[[], Any], what: str, pause_s: float = 0.02) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {DEADLINE_S:.0f} s for {what}")
        time.sleep(pause_s)
    return value


def call(url: str, body: object = None, key: str = "", method: str | None = None) -> bytes:
    """One HTTP call, up to the end of its answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        return bytes(answer.read())


def first_token(base_url: str, model: str, key: str = "") -> None:
    """Ask for a stream and return once a token of it is here."""
    body = {"model": model, "prompt": "hello", "max_tokens": 4, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    url, data = f"{base_url}/v1/completions", json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        for line in answer:
            if b'"choices"' in line:
                answer.read()
                return
    raise SystemExit(f"no token came from {url}")


def pss_bytes(pid: int) -> int:
    """Of a process and all below it."""
    root = psutil.Process(pid)
    tree = [root, *root.children(recursive=True)]
    return sum(int(process.memory_full_info().pss) for process in tree)


def write_438_mb(root: Path, tiny: Path) -> Path:
    """A random Llama, hidden size 1024, 16 layers, with the tiny one's tokenizer."""
    import torch
    import transformers

    target = root / "model-438"
    shutil.copytree(tiny, target)
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.update(
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
         "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target


class Plain:
    """vLLM as anyone starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, spec: ModelSpec) -> Start:
        booked = estimate(spec, spec.source, "cpu").total_bytes
        ctx = LaunchContext(
            replica_id="plain", host="127.0.0.1", port=free_port("127.0.0.1", ()),
            route_key="route", control_key="control", device_kind="cpu", device_ids=("cpu",),
            device_indexes=(0,), device_bytes=booked, model_path=spec.source, revision=None,
            device_total_bytes=psutil.virtual_memory().total, python=sys.executable,
            cache_dir=str(self.folder / "cache"),
        )  # fmt: skip
        launch = get_engine("vllm").launch(spec, ctx)
        url = f"http://127.0.0.1:{ctx.port}"
        begun = time.monotonic()
        with (self.folder / "plain.log").open("wb") as output:
            engine = subprocess.Popen(
                launch.argv, env=base_environment(os.environ) | launch.env, cwd=self.folder,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            wait(lambda: _healthy(engine, url, output.name), "a plain engine")
            first_token(url, spec.name, "route")
            return Start(time.monotonic() - begun, pss_bytes(engine.pid))
        finally:
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()


def _healthy(engine: subprocess.Popen[bytes], url: str, log: str) -> bool:
    if engine.poll() is not None:
        raise SystemExit(f"vLLM ended with {engine.returncode}: {Path(log).read_text()[-2000:]}")
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        call(f"{url}/health")
        return True
    return False


class Stoker:
    """A running `stoker up`."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, str]) -> None:
        self._process = process
        self.router = ready["router"]
        self._up = json.loads((Path(ready["state_dir"]) / "up.json").read_text())

    def admin(self, path: str, body: object = None) -> Any:
        return json.loads(call(self._up["admin"] + path, body, self._up["token"]) or b"null")

    def launcher_ready(self) -> bool:
        """Whether the agent has a parent to fork from."""
        for node in self.admin("/admin/nodes")["nodes"]:
            if b"stoker_agent_launchers 1.0" in call(
                f"{node['address']}/metrics", key=self._up["token"]
            ):
                return True
        return False

    def launcher_pss_bytes(self) -> int:
        (pid,) = (
            p.pid
            for p in psutil.Process(self._process.pid).children(recursive=True)
            if "stoker-launcher" in " ".join(p.cmdline())
        )
        return int(psutil.Process(pid).memory_full_info().pss)

    def start(self, spec: ModelSpec) -> Start:
        """A cold invoke; the model is unloaded again afterwards."""
        begun = time.monotonic()
        first_token(self.router, spec.name)
        took = time.monotonic() - begun
        (replica,) = self._replicas(spec.name)
        start = Start(took, pss_bytes(replica["pid"]))
        self.admin(f"/admin/models/{spec.name}/unload", {})
        wait(lambda: not self._replicas(spec.name), "the unload")
        return start

    def _replicas(self, model: str) -> list[dict[str, Any]]:
        return [r for r in self.admin("/admin/replicas")["replicas"] if r["model"] == model]


@contextlib.contextmanager
def stoker_up(folder: Path) -> Iterator[Stoker]:
    argv = [sys.executable, "-m", "cli.main", "up", "--port", "0", "--json", "--devices", "cpu"]
    argv += ["--state-dir", str(folder / "state")]
    with (folder / "up.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit((folder / "up.log").read_text())
        stoker = Stoker(process, json.loads(line))
        wait(stoker.launcher_ready, "the launcher", 0.2)
        yield stoker
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def measure(plain: Plain, stoker: Stoker, spec: ModelSpec, rounds: int) -> list[Row]:
    """Alternating cold starts, after an uncounted one of each kind: both find the page cache and
    their own compile caches as warm."""
    label, target = LABELS[spec.name]
    stoker.admin("/admin/models", {"name": spec.name, "source": spec.source,
                                   "engine_args": spec.engine_args})  # fmt: skip
    stoker.start(spec)
    if "enforce_eager" not in spec.engine_args:
        plain.start(spec)
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(plain.start(spec))
        ours.append(stoker.start(spec))
    return [
        Row(f"cold to first token s, {label}", _median(s.first_token_s for s in ours),
            _median(s.first_token_s for s in theirs), "plain vLLM", target),
        Row(f"MiB an engine (Pss), {label}", _median(s.pss_bytes / MIB for s in ours),
            _median(s.pss_bytes / MIB for s in theirs), "plain vLLM"),
    ]  # fmt: skip


def _median(values: Iterator[float]) -> float:
    return statistics.median(list(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of the tiny model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-bench-")))
        tiny = write_model(folder / "models", "tiny")
        args = {"enforce_eager": True, "max_model_len": 512}
        specs = [ModelSpec(name="tiny", source=str(tiny), engine_args=args)]
        if not options.quick:
            big = write_438_mb(folder / "models", tiny)
            specs.append(ModelSpec(name="big", source=str(big), engine_args=args))
            compiled = {"max_model_len": 512}
            specs.append(ModelSpec(name="compiled", source=str(big), engine_args=compiled))
        stoker = stack.enter_context(stoker_up(folder))
        plain = Plain(folder)
        rows = []
        for spec in specs:
            rows += measure(plain, stoker, spec, 1 if options.quick else ROUNDS)
        alone = stoker.launcher_pss_bytes() / MIB
        rows.append(Row("MiB the launcher holds (Pss), no engine up", alone, alone, "itself"))
    print_report("coldstart", rows, options.json)


if __name__ == "__main__":
    main()
