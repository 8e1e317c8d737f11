"""A host whose link goes down says nothing, neither FIN nor RST: tried in namespaces of our own."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import aiohttp
import pytest

from runtime.registry.consul import ConsulRegistry
from runtime.registry.protocol import RegistryError
from runtime.router.proxy.upstream import EngineTimeouts, Upstream, UpstreamError
from runtime.sockets import tcp_connector

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and iproute2",
    ),
]

NAME = f"st{os.getpid()}"
# Four addresses of their own for each test process: two may run side by side.
NET = f"10.213.{os.getpid() // 64 % 256}"
US, HOST = (f"{NET}.{os.getpid() % 64 * 4 + n}" for n in (1, 2))
# Answers posts to /quick, and nothing to /slow; of /half it sends the half. As Consul it answers
# a read of a key, and one that waits for a change not at all.
SERVER = """
import asyncio
async def serve(reader, writer):
    while True:
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        if head.startswith(b"POST"):
            await reader.readexactly(2)
        if b"/v1/kv/" in head and b"index=" not in head:
            answer = b"HTTP/1.1 200 OK\\r\\nX-Consul-Index: 7\\r\\nContent-Length: 2\\r\\n\\r\\n[]"
            writer.write(answer)
        elif b"/quick" in head:
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
        elif b"/half" in head:
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 9\\r\\n\\r\\nhalf")
async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 8000)
    print("ready", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, timeout=30)


@pytest.fixture
def host() -> Iterator[str]:
    """The base URL of a server in a namespace; `cut` takes its link away."""
    try:
        ip("netns", "add", NAME)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made: {error.stderr.decode().strip()}")
    server = None
    try:
        ip("link", "add", f"{NAME}a", "type", "veth", "peer", "name", f"{NAME}b")
        ip("link", "set", f"{NAME}b", "netns", NAME)
        ip("addr", "add", f"{US}/30", "dev", f"{NAME}a")
        ip("link", "set", f"{NAME}a", "up")
        ip("-n", NAME, "addr", "add", f"{HOST}/30", "dev", f"{NAME}b")
        ip("-n", NAME, "link", "set", f"{NAME}b", "up")
        server = subprocess.Popen(
            ["ip", "netns", "exec", NAME, sys.executable, "-c", SERVER], stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield f"http://{HOST}:8000"
    finally:
        if server is not None:
            server.kill()
            server.wait(10)
        ip("link", "del", f"{NAME}a", check=False)
        ip("netns", "del", NAME, check=False)


def cut() -> None:
    ip("-n", NAME, "link", "set", f"{NAME}b", "down")


@pytest.mark.parametrize("when", ["before it is sent", "before the first byte", "in the middle"])
async def test_a_call_to_a_host_that_vanishes_ends_within_seconds(host: str, when: str) -> None:
    upstream = Upstream(EngineTimeouts())
    try:
        reply = await upstream.post(host, "/quick", [], b"{}")
        assert await reply.read() == b"ok"
        assert await reply.read() == b""

        async def call() -> None:
            if when == "in the middle":
                half = await upstream.post(host, "/half", [], b"{}")
                assert await half.read() == b"half"
                cut()
                await half.read()
            if when == "before it is sent":
                cut()
            await upstream.post(host, "/slow", [], b"{}")

        began = time.monotonic()
        task = asyncio.create_task(call())
        if when == "before the first byte":
            await asyncio.sleep(1.0)  # it has arrived: nothing is left to be acknowledged
            cut()
        with pytest.raises(UpstreamError):
            await asyncio.wait_for(task, 60)
        assert time.monotonic() - began < 25
    finally:
        upstream.close()


async def test_a_read_of_a_consul_that_vanishes_ends_long_before_its_own_time(host: str) -> None:
    registry = ConsulRegistry(host)
    try:
        entries, index = await registry.list("models")
        assert (entries, index) == ((), 7)
        began = time.monotonic()
        read = asyncio.create_task(registry.list("models", index, wait_s=300.0))
        await asyncio.sleep(1.0)
        cut()
        with pytest.raises(RegistryError, match="cannot list models"):
            await asyncio.wait_for(read, 60)
        assert time.monotonic() - began < 25
    finally:
        await registry.close()


async def test_a_session_of_ours_hears_that_a_host_vanished(host: str) -> None:
    """As the command line asks, which waits for a cold start without a limit of its own."""
    no_limit = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=tcp_connector(), timeout=no_limit) as session:
        call = asyncio.create_task(session.post(f"{host}/slow", data=b"{}"))
        await asyncio.sleep(1.0)
        cut()
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(call, 30)
