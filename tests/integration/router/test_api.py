"""Paths and bodies of the router's API: models, /invoke, a URL for each model, forms."""

from __future__ import annotations

import aiohttp
import pytest
from yarl import URL

from runtime.engine import guard
from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, error_of, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


async def test_a_model_that_is_not_there_is_one_404_at_either_door(stack: Stack) -> None:
    await stack.serve("llama")
    for _ in range(2):  # the first one ends nothing
        async with stack.post(CHAT, {"model": "lama"}) as response:
            assert response.status == 404
            assert response.headers["Content-Type"] == "application/json"
            error = (await response.json())["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert error["message"] == "there is no model 'lama'; did you mean 'llama'?"


async def test_models(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.scheduler.publish(
        kit.model("a", engine, warmth="hot", aliases=("org/a", "other:1")), kit.model("b")
    )
    await stack.scheduler.in_force()

    async def get(path: str) -> dict:
        async with stack.session.get(URL(stack.url + path, encoded=True)) as response:
            return await response.json()

    listing = await get("/v1/models")
    assert listing["object"] == "list"
    a, *aliases, b = listing["data"]
    assert [card["id"] for card in aliases] == ["org/a", "other:1"]
    assert a == {
        "id": "a", "object": "model", "created": a["created"], "owned_by": "stoker",
        "root": "a", "parent": None, "max_model_len": None, "permission": a["permission"],
        "warmth": "hot", "aliases": ["org/a", "other:1"],
    }  # fmt: skip
    assert isinstance(a["created"], int)
    assert (b["id"], b["warmth"]) == ("b", "cold")
    assert await get("/v1/models/a") == a
    for name in ("org/a", "org%2Fa"):
        assert await get(f"/v1/models/{name}") == aliases[0]
    assert await get("/v1/models/other:1") == aliases[1]
    assert await get("/models/org%2Fa/v1/models") == {"object": "list", "data": [a, *aliases]}
    assert await get("/models/a/v1/models/org%2Fa") == aliases[0]
    assert (await get("/models/a/v1/models/b"))["error"]["code"] == "model_not_found"
    assert "did you mean" in (await get("/v1/models/org/b"))["error"]["message"]


@pytest.mark.parametrize(
    ("body", "query", "target", "sent"),
    [
        ({"prompt": "p", "n": 2}, "", "/v1/completions", {"prompt": "p", "n": 2}),
        ({"messages": []}, "", "/v1/chat/completions", {"messages": []}),
        ({"input": ["a"]}, "", "/v1/embeddings", {"input": ["a"]}),
        ({"prompt": "p"}, "?stream=true", "/v1/completions", {"prompt": "p", "stream": True}),
        ({"prompt": "p"}, "?stream=0", "/v1/completions", {"prompt": "p", "stream": False}),
    ],
)
async def test_invoke(stack: Stack, body: dict, query: str, target: str, sent: dict) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    for path, name in (
        ("/invoke/m", "m"),
        ("/invoke/org/m", "org/m"),
        ("/invoke/org%2Fm", "org/m"),
    ):
        url = URL(stack.url + path + query, encoded=True)
        async with stack.session.post(url, json={**body, "model": "ignored"}) as response:
            assert response.status == 200
        received = engine.received[-1]
        assert (received.target, received.json()) == (target, {**sent, "model": name})


async def test_one_base_url_per_model(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    raw = b'{"model":"gpt-4","temperature":1.0e0,"text":"\\u0041"}'
    for path, name in (
        ("/models/m", "m"),
        ("/models/org/m", "org/m"),
        ("/models/org%2Fm", "org/m"),
    ):
        url = URL(f"{stack.url}{path}{CHAT}", encoded=True)
        async with stack.session.post(url, data=raw) as response:
            assert response.status == 200
        received = engine.received[-1]
        assert received.target == CHAT
        assert received.body == raw.replace(b"gpt-4", name.encode())


PATHS = (
    "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/score",
    "/v1/rerank", "/score", "/rerank", "/v2/rerank", "/v2/embed", "/pooling",
    "/classify", "/tokenize", "/detokenize",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_every_inference_path_passes_unknown_fields_and_all(stack: Stack, path: str) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    body = b'{"x-new": {"n": 1.0e2}, "model": "m"}'
    async with stack.post(path, body, headers={"x-api-key": "the-client's"}) as response:
        assert (response.status, await response.read()) == (200, b'{"ok":true}')
    (received,) = engine.received
    assert (received.target, received.body) == (path, body)
    assert received.header("x-api-key") is None
    assert guard.refuse(path, b"Bearer k", guard.Keys(b"k", b"control")) is None


def form_of(model: str | None) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", bytes(range(256)) * 100 + b"\r\n--", filename="a.wav")
    if model is not None:
        form.add_field("model", model)
    form.add_field("language", "en")
    return form


async def test_a_forms_model_is_found_after_its_file(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    url = stack.url + "/v1/audio/transcriptions"
    for name in ("m", "org/m"):
        async with stack.session.post(url, data=form_of(name)) as response:
            assert response.status == 200
        received = engine.received[-1]
        assert received.header("Content-Type").startswith("multipart/form-data; boundary=")
        assert bytes(range(256)) * 100 + b"\r\n--" in received.body
        assert name.encode() in received.body
    async with stack.session.post(url, data=form_of(None)) as response:
        assert response.status == 400
        assert (await error_of(response))["param"] == "model"
    async with stack.session.post(
        stack.url + "/models/m/v1/audio/transcriptions", data=form_of(None)
    ) as response:
        assert response.status == 200
    assert [r.target for r in engine.received] == ["/v1/audio/transcriptions"] * 3


@pytest.mark.parametrize("body", [b"", b"--b\r\n", b"--b\r\nnonsense\r\n\r\nx\r\n--b--\r\n", b"x"])
async def test_a_damaged_form_is_400(stack: Stack, body: bytes) -> None:
    await stack.serve("m", await stack.engine(unary()))
    async with stack.session.post(
        stack.url + "/v1/audio/transcriptions", data=body,
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    ) as response:  # fmt: skip
        assert response.status == 400
        await error_of(response)
