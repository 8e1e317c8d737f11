"""`stoker invoke`: a stream as it comes, what it waits for, and every way it can end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from tests.kits.checkout import ROOT
from tests.kits.cli_runner import FakeServer, error, serving, sse, stoker

CHAT = "POST /v1/chat/completions"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def chunk(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


USAGE = "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 2}})
DONE = "data: [DONE]"


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(fake: FakeServer) -> None:
    fake.replies[CHAT] = sse(
        ": waiting for m: a replica, 0s",
        ": waiting for m: starting on gpu-1, 5s, about 30s left",
        ": waiting for m: starting on gpu-1, 10s, about 25s left",
        chunk("Hel"), chunk("lo"), USAGE, DONE,
    )  # fmt: skip
    done = stoker(fake, "invoke", "m", "hi", "--max-tokens", "2")
    assert done.exit_code == 0, done.output
    assert done.stdout == "Hello\n"
    lines = done.stderr.splitlines()
    assert lines[:2] == [
        "waiting for m: a replica",
        "waiting for m: starting on gpu-1, about 30s left",
    ]
    assert len(lines) == 3, "the same reason is said once"
    assert lines[2].startswith("first token ")
    assert lines[2].endswith(", 2 tokens")
    sent = json.loads(fake.bodies(CHAT)[0])
    assert sent["messages"] == [{"role": "user", "content": "hi"}]
    assert (sent["model"], sent["max_tokens"], sent["stream"]) == ("m", 2, True)


def test_a_terminal_shows_the_seconds_it_has_waited(fake: FakeServer) -> None:
    """The real command on a real terminal; the answer comes once a second was shown."""
    seen = threading.Event()

    async def held(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": waiting for m: starting on gpu-1, 0s\n\n")
        await asyncio.wait_for(asyncio.to_thread(seen.wait), 30)
        await response.write("\n\n".join([chunk("Hello"), DONE, ""]).encode())
        return response

    fake.replies[CHAT] = held
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "cli.main", "--router", fake.url, "invoke", "m", "hi"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=env, cwd=ROOT):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that its last writer is gone
            while piece := os.read(ours, 4096):
                shown += piece
                if re.search(rb"starting on gpu-1 \S*0:00:0[1-9]", shown):
                    seen.set()
    os.close(ours)
    assert seen.is_set(), shown
    assert b"Hello" in shown


def test_raw_completes_the_prompt_as_it_is(fake: FakeServer) -> None:
    piece = "data: " + json.dumps({"choices": [{"text": "time"}]})
    fake.replies["POST /v1/completions"] = sse(piece, DONE)
    done = stoker(fake, "invoke", "m", "once upon a", "--raw")
    assert done.stdout == "time\n"
    assert json.loads(fake.bodies("POST /v1/completions")[0])["prompt"] == "once upon a"


def test_no_stream_prints_the_whole_answer(fake: FakeServer) -> None:
    fake.replies[CHAT] = sse(chunk("Hel"), chunk("lo"), DONE)
    assert stoker(fake, "invoke", "m", "hi", "--no-stream").stdout == "Hello\n"


def test_json_is_the_apis(fake: FakeServer) -> None:
    fake.replies[CHAT] = b'{"id": 1,  "choices": []}'
    assert stoker(fake, "invoke", "m", "hi", "--json").stdout == '{"id": 1,  "choices": []}\n'
    assert "stream" not in json.loads(fake.bodies(CHAT)[0])


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_a_refusal_is_an_error_in_words(fake: FakeServer, args: list[str]) -> None:
    fake.replies[CHAT] = (404, error("there is no model 'm'; did you mean 'n'?"))
    done = stoker(fake, "invoke", "m", "hi", *args)
    assert done.exit_code == 1
    assert done.stderr == "Error: there is no model 'm'; did you mean 'n'?\n"


def test_who_needs_a_key_hears_where_to_put_it(fake: FakeServer) -> None:
    fake.replies[CHAT] = (401, {"error": {"message": "send an API key"}})
    done = stoker(fake, "invoke", "m", "hi")
    assert done.exit_code == 1
    assert "send an API key; put a key into STOKER_API_KEY" in done.stderr


def test_an_error_after_the_wait_began(fake: FakeServer) -> None:
    refusal = "data: " + json.dumps({"error": {"message": "m did not start in 300 s"}})
    fake.replies[CHAT] = sse(": waiting for m: a replica, 0s", refusal, DONE)
    done = stoker(fake, "invoke", "m", "hi")
    assert done.exit_code == 1
    assert "Error: m did not start in 300 s" in done.stderr


def test_an_answer_that_breaks_off_is_no_success(fake: FakeServer) -> None:
    fake.replies[CHAT] = sse(chunk("Hel"))
    done = stoker(fake, "invoke", "m", "hi")
    assert done.exit_code == 1
    assert "broke off before its end" in done.stderr


def test_a_router_that_hangs_up(fake: FakeServer) -> None:
    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.close()
        return web.Response()

    fake.replies[CHAT] = hang_up
    done = stoker(fake, "invoke", "m", "hi")
    assert done.exit_code == 1
    assert "no answer from the router" in done.stderr


def test_a_line_that_is_not_json(fake: FakeServer) -> None:
    fake.replies[CHAT] = sse("data: oops", DONE)
    assert "not JSON: oops" in stoker(fake, "invoke", "m", "hi").stderr
