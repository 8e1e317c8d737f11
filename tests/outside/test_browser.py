"""A page in a real browser calls the router of another origin, and can read what it says: answers,
streams, and every failure, also those before any handler."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.kits.cluster import running

LIMIT_S = 120.0
BODY = json.dumps({"model": "parrot", "prompt": "one two", "max_tokens": 2})
STREAM = json.dumps({"model": "parrot", "prompt": "one two", "max_tokens": 2, "stream": True})
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
NO_KEY = {"Authorization": "Bearer sk-stoker-nobody0000-" + "s" * 43}
# Name -> path, what fetch is told, and the status that the page has to see.
CALLS: dict[str, tuple[str, dict[str, Any], int]] = {
    "models": ("/v1/models", {}, 200),
    "completion": (COMPLETIONS, {"method": "POST", "headers": JSON, "body": BODY}, 200),
    "stream": (COMPLETIONS, {"method": "POST", "headers": JSON, "body": STREAM}, 200),
    "bad JSON": (COMPLETIONS, {"method": "POST", "headers": JSON, "body": "{"}, 400),
    "unknown path": ("/v1/nothing", {"method": "POST", "headers": JSON, "body": "{}"}, 404),
    "wrong method": (CHAT, {"method": "DELETE"}, 405),
    "wrong key": ("/v1/models", {"headers": NO_KEY}, 401),
    "too large": (COMPLETIONS, {"method": "POST", "headers": JSON, "body": "x" * 70_000}, 413),
    "odd encoding": (
        COMPLETIONS,
        {"method": "POST", "headers": {**JSON, "Content-Encoding": "br"}, "body": BODY},
        415,
    ),
    "long line": ("/v1/models", {"headers": {"X-Long": "y" * 20_000}}, 431),
    "large head": ("/v1/models", {"headers": {f"X-{n}": "y" * 9_000 for n in range(9)}}, 431),
}
PAGE = """<!doctype html><script>
async function call([path, options]) {
  try {
    const answer = await fetch(ROUTER + path, options);
    const text = await answer.text();
    return {status: answer.status, id: answer.headers.get("X-Request-ID"), text};
  } catch (error) { return {status: 0, text: String(error)}; }
}
(async () => {
  const told = {};
  for (const [name, asked] of Object.entries(CALLS)) told[name] = await call(asked);
  await fetch("/told", {method: "POST", body: JSON.stringify(told)});
})();
</script>"""


class Site(ThreadingHTTPServer):
    """Another origin: it has one page, and hears what that was told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin = f"http://localhost:{self.server_port}"
        self.page = ""
        self.told: queue.Queue[dict[str, Any]] = queue.Queue()


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self._answer(self.server.page.encode())

    def do_POST(self) -> None:
        self.server.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None: ...


@pytest.fixture
def site() -> Iterator[Site]:
    browser()
    made = Site()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def browser() -> str:
    """Its path; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("there is no Chromium on this host (Debian: apt-get install chromium)")


def asked_by_a_page(site: Site, profile: Path) -> dict[str, Any]:
    """What the page was told, by call."""
    argv = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-proxy-server", f"--user-data-dir={profile}", site.origin,
    ]  # fmt: skip
    with (profile.parent / "browser.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        return site.told.get(timeout=LIMIT_S)
    except queue.Empty:
        raise AssertionError((profile.parent / "browser.log").read_text()) from None
    finally:
        process.terminate()
        process.wait(30)


def test_a_page_of_a_listed_origin_can_read_every_answer(site: Site, tmp_path: Path) -> None:
    settings = {
        "STOKER_ROUTER_CORS_ORIGINS": site.origin, "STOKER_ROUTER_MAX_BODY_BYTES": "65536",
    }  # fmt: skip
    with running(tmp_path / "s", "--devices", "simulated:1x24GiB", **settings) as cluster:
        cluster.add_stub("parrot", 2, min_replicas=1)
        assert cluster.complete("parrot").ok
        calls = {name: (path, options) for name, (path, options, _) in CALLS.items()}
        script = f"const ROUTER = {json.dumps(cluster.router)}, CALLS = {json.dumps(calls)};"
        site.page = PAGE.replace("<script>", f"<script>{script}", 1)
        told = asked_by_a_page(site, tmp_path / "profile")
        assert {name: answer["status"] for name, answer in told.items()} == {
            name: status for name, (_, _, status) in CALLS.items()
        }, told
        assert json.loads(told["completion"]["text"])["choices"][0]["text"] == "one two"
        assert told["stream"]["text"].endswith("data: [DONE]\n\n")
        for name, (_, _, status) in CALLS.items():
            assert told[name]["id"], name
            if status >= 400:
                assert json.loads(told[name]["text"])["error"]["message"], name


def test_a_page_of_another_origin_reads_nothing(site: Site, tmp_path: Path) -> None:
    settings = {"STOKER_ROUTER_CORS_ORIGINS": "https://chat.example.com"}
    with running(tmp_path / "s", "--devices", "simulated:1x24GiB", **settings) as cluster:
        script = f"const ROUTER = {json.dumps(cluster.router)}, CALLS = "
        script += json.dumps({"models": ("/v1/models", {})}) + ";"
        site.page = PAGE.replace("<script>", f"<script>{script}", 1)
        told = asked_by_a_page(site, tmp_path / "profile")
    assert told["models"]["status"] == 0
    assert "TypeError" in told["models"]["text"]
