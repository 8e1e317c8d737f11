"""Other proxies for the router's benchmark, each a process of its own in front of one engine.

Those from PyPI live in virtual environments of their own under $STOKER_BENCH_CACHE (by default
~/.cache/stoker-bench) and are installed when they are missing, unless the run is a quick one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.lib.http_load import KEY

LIB = Path(__file__).parent
NGINX = "/usr/sbin/nginx"
VERSIONS = {"vllm-router": "vllm-router==0.1.17", "litellm": "litellm[proxy]==1.108.7"}
READY_S = 60.0
NGINX_CONF = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  keepalive_requests 100000000;
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; client_max_body_size 32m;
    }}
  }}
}}
"""
LITELLM_CONF = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{origin}/v1", api_key: x}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false}}
"""


class Target(NamedTuple):
    """Something to send the load to; `pid` is None for the engine itself."""

    name: str
    port: int
    pid: int | None


class Missing(Exception):
    """This peer cannot be run here; says why."""


@contextlib.contextmanager
def process(
    *argv: object, env: dict[str, str] | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A child that ends with the block; its output goes to `log`, or stdout to a pipe."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("w")) if log else None
        child = subprocess.Popen(
            [*map(str, argv)], stdout=file or subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT if file else None, env=env,
        )  # fmt: skip
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def python_server(name: str, script: str, *args: object) -> Iterator[Target]:
    """One of the servers in bench/lib; each prints its port when it is ready."""
    with process(sys.executable, LIB / script, *args) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"{script} did not start")
        yield Target(name, int(line), child.pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def wait_for(port: int, child: subprocess.Popen[str], log: Path) -> None:
    """Until something accepts there. Raises Missing with the end of the log."""
    deadline = time.monotonic() + READY_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline or child.poll() is not None:
            raise Missing(f"it did not start: …{log.read_text()[-500:]}")
        time.sleep(0.1)


@contextlib.contextmanager
def nginx(origin: int, folder: Path) -> Iterator[Target]:
    """One worker, unbuffered, keep-alive on both sides."""
    if not Path(NGINX).exists():
        raise Missing(f"{NGINX} is not there (apt install nginx)")
    port, conf, log = free_port(), folder / "nginx.conf", folder / "error.log"
    conf.write_text(NGINX_CONF.format(dir=folder, origin=origin, port=port))
    log.touch()
    with process(NGINX, "-c", conf, "-e", log) as child:
        wait_for(port, child, log)
        yield Target("nginx", port, child.pid)


@contextlib.contextmanager
def vllm_router(origin: int, folder: Path, may_install: bool) -> Iterator[Target]:
    """The vLLM project's router, in Rust."""
    program = _installed("vllm-router", may_install) / "vllm-router"
    port, log = free_port(), folder / "vllm-router.log"
    argv = (
        program, "--worker-urls", f"http://127.0.0.1:{origin}", "--policy", "round_robin",
        "--host", "127.0.0.1", "--port", port, "--prometheus-port", free_port(),
        "--log-level", "error",
    )  # fmt: skip
    with process(*argv, log=log) as child:
        wait_for(port, child, log)
        time.sleep(2.0)  # it listens before it has found its worker healthy
        yield Target("vllm-router", port, child.pid)


@contextlib.contextmanager
def litellm(origin: int, folder: Path, may_install: bool) -> Iterator[Target]:
    """LiteLLM's proxy: one worker, its key check on."""
    program = _installed("litellm", may_install) / "litellm"
    port, conf, log = free_port(), folder / "litellm.yaml", folder / "litellm.log"
    conf.write_text(LITELLM_CONF.format(origin=origin, key=KEY))
    argv = (program, "--config", conf, "--host", "127.0.0.1", "--port", port)
    env = {
        **os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR",
    }  # fmt: skip
    env.pop("PYTHONPATH", None)
    with process(*argv, env=env, log=log) as child:
        wait_for(port, child, log)
        yield Target("LiteLLM", port, child.pid)


def _installed(name: str, may_install: bool) -> Path:
    """The bin folder of the peer's environment. Raises Missing."""
    cache = os.environ.get("STOKER_BENCH_CACHE") or Path.home() / ".cache" / "stoker-bench"
    folder = Path(cache) / name
    program = folder / "bin" / name
    if program.exists():
        return folder / "bin"
    if not may_install:
        raise Missing(f"not installed in {folder} (a run without --quick does)")
    for argv in (
        [sys.executable, "-m", "venv", "--clear", folder],
        [folder / "bin" / "python", "-m", "pip", "install", "-q", VERSIONS[name]],
    ):
        done = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Missing(f"cannot be installed: …{done.stderr[-300:]}")
    return folder / "bin"
