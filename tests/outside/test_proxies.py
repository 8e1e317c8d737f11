"""A reverse proxy between callers and the router: nginx, which most people take."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from msgspec.structs import fields
from requests.adapters import HTTPAdapter

from runtime.contract.config import RouterConfig
from runtime.router.front.fast_path import KEEP_ALIVE_S
from runtime.wire.model_spec import ModelSpec
from tests.kits.cluster import Cluster, running, wait_until
from tests.outside.nginx import Fronts, documented, in_front_of

MIB = 2**20
SAID = "one two three"
KEEPALIVE_S = 60.0  # how long nginx keeps an idle connection to the router by default
CALLER = "127.0.0.7"  # where a caller's own connection to nginx comes from
UNBUFFERED = pytest.param("unbuffered", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "access.log"


@pytest.fixture(scope="module")
def cluster(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {
        "STOKER_ROUTER_ANONYMOUS": "off", "STOKER_ROUTER_HEARTBEAT_S": "0.5",
        "STOKER_ROUTER_TRUSTED_PROXIES": "127.0.0.1", "STOKER_ROUTER_ACCESS_LOG": str(log),
    }  # fmt: skip
    state = tmp_path_factory.mktemp("proxies") / "s"
    with running(state, "--devices", "simulated:2x24GiB", **settings) as made:
        args = {"start_s": 0.1, "token_s": 0.3}
        made.add_stub("parrot", 2, min_replicas=1, engine_args=args)
        yield made


@pytest.fixture(scope="module")
def fronts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    with in_front_of(cluster.router, tmp_path_factory.mktemp("nginx")) as made:
        yield made


@pytest.fixture(scope="module")
def key(cluster: Cluster) -> str:
    made = cluster.admin("POST", "/admin/keys", {"tenant": "outside"})["token"]
    url, body = f"{cluster.router}/v1/completions", {"model": "parrot", "prompt": "x"}

    def known() -> bool:
        headers = {"Authorization": f"Bearer {made}"}
        return requests.post(url, json=body, headers=headers, timeout=60).ok

    wait_until(known, "the router knows the key and the model is warm")
    return made


class Caller(NamedTuple):
    """Somebody behind nginx."""

    session: requests.Session
    url: str
    key: str

    def post(self, path: str = "/v1/completions", **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        options = {"timeout": 120, **options}
        return self.session.post(self.url + path, headers=headers, **options)


@contextlib.contextmanager
def calling(fronts: Fronts, way: str, key: str) -> Iterator[Caller]:
    with requests.Session() as session:
        session.verify, session.trust_env = fronts.certificate, False
        for scheme in ("http://", "https://"):
            session.mount(scheme, _From(CALLER))
        yield Caller(session, getattr(fronts, way), key)


class _From(HTTPAdapter):
    """Connects from an address of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *words: Any, **options: Any) -> Any:
        return super().init_poolmanager(*words, source_address=(self._address, 0), **options)


@pytest.fixture(params=["default", "documented", UNBUFFERED])
def caller(request: pytest.FixtureRequest, fronts: Fronts, key: str) -> Iterator[Caller]:
    with calling(fronts, request.param, key) as made:
        yield made


@pytest.fixture(params=["documented", UNBUFFERED])
def with_settings(request: pytest.FixtureRequest, fronts: Fronts, key: str) -> Iterator[Caller]:
    with calling(fronts, request.param, key) as made:
        yield made


@contextlib.contextmanager
def cold(cluster: Cluster, name: str, start_s: float) -> Iterator[str]:
    cluster.add_stub(name, 2, engine_args={"start_s": start_s, "token_s": 0.01})
    try:
        yield name
    finally:
        cluster.admin("DELETE", f"/admin/models/{name}")


def asked(model: str = "parrot", **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": SAID, "max_tokens": 3, **fields}


def arrivals(answer: requests.Response) -> list[tuple[float, str]]:
    """When each line of the stream came."""
    lines = answer.iter_lines(chunk_size=1, decode_unicode=True)
    return [(time.monotonic(), str(line)) for line in lines if line]


def test_plain_calls(caller: Caller) -> None:
    for _ in range(3):
        answer = caller.post(json=asked())
        assert answer.ok, answer.text
        assert answer.json()["choices"][0]["text"] == SAID
        assert answer.headers["X-Request-ID"]


def test_a_stream_comes_as_it_is_made(caller: Caller) -> None:
    answer = caller.post(json=asked(max_tokens=12, stream=True), stream=True)
    came = arrivals(answer)
    assert came[-1][1] == "data: [DONE]"
    took_s = came[-1][0] - came[0][0]
    assert took_s > 1.5, f"12 tokens, one each 0.3 s, came within {took_s:.1f} s"


def test_who_waits_for_a_start_hears_of_it(cluster: Cluster, caller: Caller) -> None:
    with cold(cluster, "cold", 3.0) as model:
        answer = caller.post(json=asked(model, stream=True), stream=True)
        came = arrivals(answer)
    assert came[0][1].startswith(": waiting for cold"), came[0]
    assert came[-1][1] == "data: [DONE]"
    first = next(at for at, line in came if line.startswith("data:"))
    assert first - came[0][0] > 1.0, "the comments came together with the answer"


def test_an_answer_after_a_start(cluster: Cluster, caller: Caller) -> None:
    with cold(cluster, "cold", 3.0) as model:
        answer = caller.post(json=asked(model))
    assert answer.json()["choices"][0]["text"] == SAID


def test_a_proxy_that_gives_up_before_the_start(cluster: Cluster, fronts: Fronts, key: str) -> None:
    """What docs/install.md says of proxy_read_timeout."""
    with calling(fronts, "impatient", key) as caller, cold(cluster, "cold", 6.0) as model:
        assert caller.post(json=asked(model)).status_code == 504
        answer = caller.post(json=asked(model, stream=True), stream=True)
        assert arrivals(answer)[-1][1] == "data: [DONE]"


def test_the_documented_proxy_waits_longer_than_the_router() -> None:
    assert "proxy_read_timeout 1h;" in documented()
    (hold_s,) = (f.default for f in fields(ModelSpec) if f.name == "hold_s")
    assert hold_s + RouterConfig().first_byte_timeout_s < 3600


def test_the_proxy_closes_idle_connections_before_the_router() -> None:
    """Else a call is sent into a connection that the router closes, and gets a 502."""
    assert "keepalive_timeout" not in documented()
    assert min(KEEP_ALIVE_S, RouterConfig().read_timeout_s) > KEEPALIVE_S + 10


@pytest.mark.parametrize("size", [1_000, 64 * 1024, 2 * MIB, 30 * MIB])
def test_large_bodies(with_settings: Caller, size: int) -> None:
    answer = with_settings.post(json=asked(user="u" * size, max_tokens=1))
    assert answer.ok, answer.text[:500]


def test_a_file_for_a_batch(with_settings: Caller) -> None:
    line: dict[str, Any] = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/completions",
        "body": asked(),
    }
    line["body"]["user"] = "u" * 40 * MIB  # more than max_body_bytes
    files = {"file": ("in.jsonl", json.dumps(line) + "\n")}
    answer = with_settings.post("/v1/files", files=files, data={"purpose": "batch"})
    assert answer.ok, answer.text[:500]
    assert answer.json()["bytes"] > 40 * MIB


def test_refusals_of_large_bodies_are_the_routers_own(with_settings: Caller) -> None:
    """An answer given before the body is read must not become nginx's 502."""
    answer = with_settings.post(json=asked(user="u" * 40 * MIB))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    stranger = with_settings._replace(key="sk-stoker-0123456789-" + "w" * 43)
    answer = stranger.post(json=asked(user="u" * 30 * MIB))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_refusals_say_when_to_come_back(cluster: Cluster, caller: Caller) -> None:
    limits = {"tenant": f"slow-{time.monotonic_ns()}", "limits": {"requests_per_min": 1}}
    slow = caller._replace(key=cluster.admin("POST", "/admin/keys", limits)["token"])
    wait_until(lambda: slow.post(json=asked()).ok, "the router knows the key")
    answer = slow.post(json=asked())
    assert answer.status_code == 429, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    with cold(cluster, "cold", 20.0) as model:
        answer = caller.post(json=asked(model), headers={"Prefer": "wait=1"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "hold_timeout")
        assert int(answer.headers["Retry-After"]) > 0
    cluster.add_stub("vast", 900)
    answer = caller.post(json=asked("vast"))
    cluster.admin("DELETE", "/admin/models/vast")
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"


def test_a_caller_who_hangs_up(cluster: Cluster, caller: Caller) -> None:
    answer = caller.post(json=asked(max_tokens=400, stream=True), stream=True)
    lines = answer.iter_lines(chunk_size=1)
    next(lines)
    wait_until(lambda: cluster.admin("GET", "/admin/models/parrot")["in_flight"], "it is asked")
    answer.close()
    wait_until(
        lambda: cluster.admin("GET", "/admin/models/parrot")["in_flight"] == 0,
        "nothing in flight after the caller hung up", 30.0,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2 * MIB])  # the fast path, and aiohttp's server
def test_the_access_log_names_the_caller(with_settings: Caller, log: Path, size: int) -> None:
    """By the proxy's word, not by the caller's own."""
    headers = {"X-Forwarded-For": "192.0.2.1"}
    answer = with_settings.post(json=asked(user="u" * size), headers=headers)
    assert answer.ok

    def line() -> Any:
        lines = map(json.loads, log.read_text().splitlines())
        return [x for x in lines if x["request_id"] == answer.headers["X-Request-ID"]]

    assert wait_until(line, "a line in the access log")[0]["client"] == CALLER


def test_a_router_without_keys_refuses_who_comes_through_a_proxy(tmp_path: Path) -> None:
    """A proxy on its host speaks for the internet: its headers say so."""
    with (
        running(tmp_path / "s", "--devices", "simulated:1x24GiB") as cluster,
        in_front_of(cluster.router, tmp_path) as fronts,
        calling(fronts, "documented", "") as caller,
    ):
        answer = caller.session.get(caller.url + "/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_local")
        assert requests.get(cluster.router + "/v1/models", timeout=60).ok
