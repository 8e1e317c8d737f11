"""vLLM's own code refuses what Stoker has it refuse: no URL of a request reaches a socket."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys

import pytest

from runtime.engine.vllm.engine import NO_MEDIA

CODE = """
import asyncio, json, sys
from vllm.multimodal.media.connector import MediaConnector
from vllm.multimodal.media import MediaIO
class Any(MediaIO):
    def get_max_bytes(self): return 1000
    def load_bytes(self, data): return "FETCHED"
    def load_base64(self, kind, data): return "DATA"
    def load_file(self, path): return "READ"
asked = json.load(sys.stdin)
connector = MediaConnector(allowed_media_domains=asked["domains"])
async def one(url):
    try:
        return await connector.load_from_url_async(url, Any(), fetch_timeout=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
async def all_of_them():
    return [await one(url) for url in asked["urls"]]
print("RESULT" + json.dumps(asyncio.run(all_of_them())))
"""


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_vllm_fetches_nothing_by_the_flag_it_is_started_with() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        urls = [
            f"http://127.0.0.1:{port}/", f"HTTP://127.1:{port}/", f"http://localhost:{port}/",
            f"http://2130706433:{port}/", f"https://127.0.0.1:{port}/", f"httpx://127.0.0.1:{port}/",
            f"http://NONE:{port}/", f"http://{NO_MEDIA}:{port}/", f"http://[::1]:{port}/",
            f"http://x@127.0.0.1:{port}/", "file:///etc/passwd", "/etc/passwd",
            "ftp://127.0.0.1/",
        ]  # fmt: skip
        asked = {"domains": [NO_MEDIA], "urls": [*urls, "data:image/png;base64,AAAA"]}
        done = subprocess.run(
            [sys.executable, "-c", CODE], input=json.dumps(asked), capture_output=True, text=True,
            cwd="/", timeout=300, check=False,
        )  # fmt: skip
        assert "RESULT" in done.stdout, done.stderr[-2000:]
        *refused, data = json.loads(done.stdout.partition("RESULT")[2])
        assert data == "DATA"
        for url, answer in zip(urls, refused, strict=True):
            assert answer.partition(":")[0].endswith(("Error", "Exception")), (url, answer)
        assert NO_MEDIA in refused[0], "the refusal says where to allow it"
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
