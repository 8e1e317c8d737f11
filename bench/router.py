"""What the router costs: against no proxy, nginx and a naive aiohttp proxy, in the same run.

    python bench/router.py [--quick] [--json]

Every server is a process of its own, one worker each; phases alternate between the servers, and
each figure is the median of its rounds. CPU is user + system of the proxy's whole process tree:
the figure to trust where client, proxy and engine share few cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from bench.lib.http_origin import CHUNKS
from bench.lib.report import Row, print_report

LIB = Path(__file__).parent / "lib"
NGINX = "/usr/sbin/nginx"
NGINX_CONF = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  keepalive_requests 100000000;
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; client_max_body_size 32m;
    }}
  }}
}}
"""


class Phase(NamedTuple):
    """One load: its name, connections, and what is asked for."""

    name: str
    connections: int
    kind: str
    share: float  # of the time of one round


PHASES = (
    Phase("32", 32, "unary", 1.0),
    Phase("1", 1, "unary", 0.5),
    Phase("8", 8, "unary", 0.5),
    Phase("64 streams", 64, "stream", 1.0),
    Phase("64 paced", 64, "paced", 1.0),
)


class Target(NamedTuple):
    """Something to send the load to; `pid` is None for the engine itself."""

    name: str
    port: int
    pid: int | None


class Figures(NamedTuple):
    """One phase against one target."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float  # per request


@contextlib.contextmanager
def process(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A child that ends with the block."""
    child = subprocess.Popen([*map(str, argv)], stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def python_server(name: str, script: str, *args: object) -> Iterator[Target]:
    """One of the servers in bench/lib; each prints its port when it is ready."""
    with process(sys.executable, LIB / script, *map(str, args)) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"{script} did not start")
        yield Target(name, int(line), child.pid)


@contextlib.contextmanager
def nginx(origin: int, folder: Path) -> Iterator[Target]:
    """nginx with one worker, unbuffered, with keep-alive on both sides."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(dir=folder, origin=origin, port=port))
    with process(NGINX, "-c", conf, "-e", folder / "error.log") as child:
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline or child.poll() is not None:
                raise SystemExit(f"nginx did not start: {(folder / 'error.log').read_text()}")
            time.sleep(0.05)
        yield Target("nginx", port, child.pid)


def cpu_s(pid: int | None) -> float:
    """User + system seconds of a process tree so far."""
    if pid is None:
        return 0.0
    parent = psutil.Process(pid)
    times = [p.cpu_times() for p in (parent, *parent.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(target: Target, phase: Phase, seconds: float) -> Figures:
    """Run one phase. Ends the benchmark if an answer was wrong: then no figure means anything."""
    before = cpu_s(target.pid)
    argv = (LIB / "http_load.py", target.port, phase.connections, seconds, phase.kind)
    out = subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, check=True
    ).stdout
    spent = cpu_s(target.pid) - before
    result = json.loads(out)
    if result["errors"]:
        raise SystemExit(f"{target.name}: {result['errors']} wrong answers in phase {phase.name}")
    count = result["requests"]
    return Figures(
        count / result["seconds"], result["p50_ms"], result["p99_ms"], 1000 * spent / count
    )


Results = dict[tuple[str, str], Figures]  # (target, phase) -> medians


def run(targets: list[Target], rounds: int, seconds: float) -> Results:
    """Every phase against every target, `rounds` times over."""
    samples: dict[tuple[str, str], list[Figures]] = {}
    for target in targets:
        measure(target, PHASES[0], 0.3)  # warm up
    for _ in range(rounds):
        for phase in PHASES:
            for target in targets:
                figures = measure(target, phase, seconds * phase.share)
                samples.setdefault((target.name, phase.name), []).append(figures)
    return {
        key: Figures(*(statistics.median(column) for column in zip(*taken, strict=True)))
        for key, taken in samples.items()
    }


def rows(results: Results, baselines: list[str]) -> list[Row]:
    """Ours against each baseline; added latency is over the direct figure of the same run."""
    out = []
    unary, stream, paced = ("ours", "32"), ("ours", "64 streams"), ("ours", "64 paced")
    for name in baselines:
        target = "<= 2.0" if name == "naive aiohttp" else None
        base = results[name, "32"]
        if name != "direct":
            out.append(
                Row("CPU ms per 1,000 requests, 32 connections", 1000 * results[unary].cpu_ms,
                    1000 * base.cpu_ms, name, target)
            )  # fmt: skip
        out.append(Row("requests/s, 32 connections", results[unary].per_s, base.per_s, name))
        for phase in ("1", "8"):
            ours, direct = results["ours", phase], results["direct", phase]
            other = results[name, phase]
            for figure in ("p50_ms", "p99_ms"):
                floor = 0.0 if name == "direct" else getattr(direct, figure)
                label = "" if name == "direct" else "added "
                out.append(
                    Row(f"{label}{figure[:3]} ms, {phase} connections",
                        getattr(ours, figure) - floor, getattr(other, figure) - floor, name)
                )  # fmt: skip
        streams, slow = results[name, "64 streams"], results[name, "64 paced"]
        out.append(
            Row("chunks/s, 64 streams back to back", CHUNKS * results[stream].per_s,
                CHUNKS * streams.per_s, name)
        )  # fmt: skip
        out.append(
            Row("TTFT p50 ms, 64 streams, 5 ms apart", results[paced].p50_ms, slow.p50_ms, name)
        )
        out.append(
            Row("TTFT p99 ms, 64 streams, 5 ms apart", results[paced].p99_ms, slow.p99_ms, name)
        )
        if name != "direct":
            out.append(
                Row("CPU ms per stream, back to back", results[stream].cpu_ms, streams.cpu_ms, name)
            )
            out.append(
                Row("CPU ms per stream, 5 ms apart", results[paced].cpu_ms, slow.cpu_ms, name)
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rounds, seconds = (1, 2.0) if options.quick else (5, 4.0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-bench-")))
        start = stack.enter_context
        origin = start(python_server("direct", "http_origin.py"))
        targets = [origin._replace(pid=None)]
        if Path(NGINX).exists():
            targets.append(start(nginx(origin.port, folder)))
        else:
            print(f"NO ROWS FOR NGINX: {NGINX} is not there (apt install nginx)", file=sys.stderr)
        targets.append(start(python_server("naive aiohttp", "naive_proxy.py", origin.port)))
        targets.append(start(python_server("ours", "our_router.py", origin.port, folder / "ours")))
        results = run(targets, rounds, seconds)
    report = rows(results, [target.name for target in targets if target.name != "ours"])
    print_report("router", report, options.json)


if __name__ == "__main__":
    main()
