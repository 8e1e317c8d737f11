"""Real vLLM engines as benchmarks start them: plainly, and through a running `stoker up`.

Both are asked for one streamed completion, and both are watched from outside of them: the kernel
says when a process began, the engine's own log says when it was ready.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from agent.engines.ports import free_port
from agent.engines.process import base_environment, start_ticks
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300.0
READY_LINE = b"Application startup complete"  # uvicorn's, once it accepts requests
_LOG_POLL_S = 0.004
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Start(NamedTuple):
    """One cold start; seconds from the call (for a plain engine: from its start)."""

    first_token_s: float
    forked_s: float  # until the engine's process began, at most a tick (10 ms) too late
    ready_s: float  # until the engine's log said that it was ready
    cpu_s: float  # that the engine's processes used, up to then
    pss_bytes: int  # of the engine's processes


def boot_s() -> float:
    """The clock that the kernel stamps processes with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wait(condition: Callable[[], Any], what: str, pause_s: float = 0.02) -> Any:
    """The condition's value once it is true; ends the benchmark if that takes too long."""
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


def first_token(base_url: str, model: str, key: str = "") -> float:
    """Ask for a stream; when (`boot_s`) a token of it was here."""
    body = {"model": model, "prompt": "hello", "max_tokens": 4, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    url, data = f"{base_url}/v1/completions", json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    seen = b""
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        for line in answer:
            if b'"choices"' in line:
                at = boot_s()
                answer.read()
                return at
            seen += line
    raise SystemExit(f"no token came from {url}: {seen[-500:].decode(errors='replace')}")


def used(pid: int) -> tuple[float, int]:
    """(CPU seconds, Pss bytes) of a process and all below it, those that ended there too."""
    root = psutil.Process(pid)
    tree = [root, *root.children(recursive=True)]
    cpu_s = sum(sum(process.cpu_times()[:4]) for process in tree)
    return cpu_s, sum(int(process.memory_full_info().pss) for process in tree)


def write_llama(
    tiny: Path, target: Path, hidden: int, inner: int, layers: int, seed: int = 1
) -> Path:
    """A random bfloat16 Llama with the tiny one's tokenizer and heads of 64."""
    import torch
    import transformers

    shutil.copytree(tiny, target)
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.update(
        {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
         "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    )  # fmt: skip
    torch.manual_seed(seed)
    make: Any = transformers.LlamaForCausalLM
    make(config).to(torch.bfloat16).save_pretrained(target)
    return target


def write_438_mb(root: Path, tiny: Path) -> Path:
    """A random Llama, hidden size 1024, 16 layers."""
    return write_llama(tiny, root / "model-438", hidden=1024, inner=2816, layers=16)


class ReadyWatch:
    """When (`boot_s`) READY_LINE first stood in a log that is written from now on.

    `logs()` are the files it may be in, which need not exist yet.
    """

    def __init__(self, logs: Callable[[], list[Path]]) -> None:
        self._logs = logs
        self._seen = {path: path.stat().st_size for path in logs() if path.exists()}
        self._over = threading.Event()
        self.at: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> float:
        """Stop watching. The moment, or now if the line never came."""
        self._over.set()
        self._thread.join()
        if self.at is None:
            raise SystemExit(f"no log said {READY_LINE.decode()!r}")
        return self.at

    def _run(self) -> None:
        while self.at is None:
            last = self._over.is_set()
            if any(READY_LINE in self._more(path) for path in self._logs()):
                self.at = boot_s()
            elif last:
                return
            time.sleep(_LOG_POLL_S)

    def _more(self, path: Path) -> bytes:
        """What is new, whole lines only."""
        with contextlib.suppress(FileNotFoundError):
            known = self._seen.get(path, 0)
            if path.stat().st_size > known:
                with path.open("rb") as file:
                    file.seek(known)
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self._seen[path] = known + len(whole)
                return whole
        return b""


class Plain:
    """vLLM as anyone starts it: one process after the other, each killed when the next comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "plain.log"
        self._engine: subprocess.Popen[bytes] | None = None

    def start(self, spec: ModelSpec) -> Start:
        """One start, and its end."""
        try:
            return self.switch(spec)
        finally:
            self.kill()

    def switch(self, spec: ModelSpec) -> Start:
        """Kill what runs and start this; it stays up."""
        begun = boot_s()
        self.kill()
        self._log.unlink(missing_ok=True)
        watch = ReadyWatch(lambda: [self._log])
        url, engine = self._launch(spec)
        wait(lambda: _healthy(engine, url, self._log), "a plain engine")
        token_at = first_token(url, spec.name, "route")
        return _start(begun, engine.pid, watch, token_at)

    def kill(self) -> None:
        """End what runs, if anything does."""
        if engine := self._engine:
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()
        self._engine = None

    def _launch(self, spec: ModelSpec) -> tuple[str, subprocess.Popen[bytes]]:
        booked = estimate(spec, spec.source, "cpu").total_bytes
        ctx = LaunchContext(
            replica_id="plain", host="127.0.0.1", port=free_port("127.0.0.1", ()),
            route_key="route", control_key="control", device_kind="cpu", device_ids=("cpu",),
            device_indexes=(0,), device_bytes=booked, model_path=spec.source, revision=None,
            device_total_bytes=psutil.virtual_memory().total, python=sys.executable,
            cache_dir=str(self._folder / "cache"),
        )  # fmt: skip
        launch = get_engine("vllm").launch(spec, ctx)
        with self._log.open("wb") as output:
            self._engine = subprocess.Popen(
                launch.argv, env=base_environment(os.environ) | launch.env, cwd=self._folder,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return f"http://127.0.0.1:{ctx.port}", self._engine


def _healthy(engine: subprocess.Popen[bytes], url: str, log: Path) -> bool:
    if engine.poll() is not None:
        raise SystemExit(f"vLLM ended with {engine.returncode}: {log.read_text()[-2000:]}")
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        call(f"{url}/health")
        return True
    return False


def _start(begun: float, pid: int, watch: ReadyWatch, token_at: float) -> Start:
    cpu_s, pss_bytes = used(pid)
    return Start(
        first_token_s=token_at - begun,
        forked_s=_began_s(pid) - begun,
        ready_s=watch.end() - begun,
        cpu_s=cpu_s,
        pss_bytes=pss_bytes,
    )


def _began_s(pid: int) -> float:
    """When (`boot_s`) a process began, rounded up to the kernel's tick."""
    ticks = start_ticks(pid)
    if ticks is None:
        raise SystemExit(f"the engine, process {pid}, is gone")
    return (ticks + 1) * _TICK_S


class Stoker:
    """A running `stoker up`."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, str]) -> None:
        self._process = process
        self.router = ready["router"]
        self._logs = Path(ready["state_dir"]) / "logs"
        self._up = json.loads((Path(ready["state_dir"]) / "up.json").read_text())

    def admin(self, path: str, body: object = None) -> Any:
        """One call of the admin API."""
        return json.loads(call(self._up["admin"] + path, body, self._up["token"]) or b"null")

    def add(self, spec: ModelSpec) -> None:
        """Add a model."""
        self.admin("/admin/models", {"name": spec.name, "source": spec.source,
                                     "engine_args": spec.engine_args,
                                     "idle_s": spec.idle_s})  # fmt: skip

    def launcher_ready(self) -> bool:
        """Whether the agent has a parent to fork from."""
        for node in self.admin("/admin/nodes")["nodes"]:
            if b"stoker_agent_launchers 1.0" in call(
                f"{node['address']}/metrics", key=self._up["token"]
            ):
                return True
        return False

    def launcher_pss_bytes(self) -> int:
        """Of the pre-imported parent."""
        (pid,) = (
            p.pid
            for p in psutil.Process(self._process.pid).children(recursive=True)
            if "stoker-launcher" in " ".join(p.cmdline())
        )
        return int(psutil.Process(pid).memory_full_info().pss)

    def start(self, spec: ModelSpec) -> Start:
        """A cold invoke; the model is unloaded again afterwards."""
        start = self.switch(spec)
        self.admin(f"/admin/models/{spec.name}/unload", {})
        wait(lambda: not self.replicas(spec.name), "the unload")
        return start

    def switch(self, spec: ModelSpec) -> Start:
        """A cold invoke; the model stays up."""
        watch = ReadyWatch(lambda: list(self._logs.glob(f"{spec.name}-*.log")))
        begun = boot_s()
        token_at = first_token(self.router, spec.name)
        (replica,) = self.replicas(spec.name)
        return _start(begun, replica["pid"], watch, token_at)

    def replicas(self, model: str) -> list[dict[str, Any]]:
        """Those of a model, in every phase."""
        return [r for r in self.admin("/admin/replicas")["replicas"] if r["model"] == model]


@contextlib.contextmanager
def stoker_up(
    folder: Path, devices: str = "cpu", launcher: bool = True, **environ: str
) -> Iterator[Stoker]:
    """Stoker on this host, its launcher ready (simulated devices have none); `environ`: settings,
    as STOKER_… variables."""
    argv = [sys.executable, "-m", "cli.main", "up", "--port", "0", "--json", "--devices", devices]
    argv += ["--state-dir", str(folder / "state")]
    with (folder / "up.log").open("w") as log:
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=os.environ | environ
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit((folder / "up.log").read_text())
        stoker = Stoker(process, json.loads(line))
        if launcher:
            wait(stoker.launcher_ready, "the launcher", 0.2)
        yield stoker
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
