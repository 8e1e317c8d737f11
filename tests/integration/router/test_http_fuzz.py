"""Odd requests and odd engine answers, on the fast path and behind aiohttp, from a seed.

    STOKER_FUZZ_COUNT=20000 STOKER_FUZZ_SEED=7 pytest tests/integration/router/test_http_fuzz.py

tries more; a failure names the seed and the case, and the same seed makes the same case again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.router.admission import breaker, decisions
from runtime.wire.routes import Endpoint, ModelRoute
from tests.kits import http_fuzz_judge as judge
from tests.kits import router_stack as kit
from tests.kits.http_fuzz_answers import Answer, answers, question
from tests.kits.http_fuzz_requests import LAST, STRAY, Case, requests

SEED = int(os.environ.get("STOKER_FUZZ_SEED", "9"))
COUNT = int(os.environ.get("STOKER_FUZZ_COUNT", "300"))
AT_ONCE = 100
CUT_S = 0.2  # how long a request whose end never comes is left alone
DEADLINE_S = 30.0
PATHS = [b"/v1/completions", b"/models/%b/v1/completions"]
_MARK = re.compile(rb"case-(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class RawEngine:
    """Keeps the bytes of each request; answers by `says`, or with a plain good answer."""

    def __init__(self, says: list[Answer] | None = None) -> None:
        self.says = says
        self.seen: dict[int, list[bytes]] = defaultdict(list)
        self.lost: list[bytes] = []  # belongs to no case
        self.url = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> RawEngine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    def endpoint(self, name: str) -> Endpoint:
        return Endpoint(replica_id=name, base_url=self.url, key=kit.KEY)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (data := await _whole_request(reader)) is not None:
                marks = _MARK.findall(data)
                if not marks:
                    self.lost.append(data)
                number = int(marks[-1]) if marks else -1
                self.seen[number].append(data)
                if not await self._answer(number, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _answer(self, number: int, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        if self.says is None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: 2\r\n\r\n{}")
            return True
        answer = self.says[number]
        for piece in answer.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if answer.end == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return answer.end == "keep"


async def _whole_request(reader: asyncio.StreamReader) -> bytes | None:
    """As framed by its one Content-Length; whatever is framed otherwise ends at its head."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    found = _LENGTH.search(head)
    return head + (await reader.readexactly(int(found[1])) if found else b"")


async def exchange(url: str, pieces: list[bytes], wait_s: float) -> tuple[bytes, bool]:
    """All that comes back, and whether the other side ended it within `wait_s`."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    got = bytearray()

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0)

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(wait_s):
            while data := await reader.read(65536):
                got += data
    except TimeoutError:
        return bytes(got), False
    except ConnectionError:
        pass  # what came before a reset is judged
    finally:
        sending.cancel()
        writer.close()
    return bytes(got), True


async def side_by_side(work: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """AT_ONCE at a time, as they come."""
    waiting = iter(work)

    async def one_after_the_other() -> None:
        for make in waiting:
            await make()

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))


@contextlib.asynccontextmanager
async def serving(
    state_dir: Path, models: list[str], says: list[Answer] | None = None
) -> AsyncIterator[tuple[kit.Stack, RawEngine]]:
    async with kit.stack(state_dir) as stack:
        engine = await RawEngine(says).start()
        try:
            routes = [
                ModelRoute(name=name, endpoints=(engine.endpoint(f"replica-{name}"),))
                for name in models
            ]
            await stack.scheduler.publish(*routes)
            await stack.scheduler.in_force()
            yield stack, engine
        finally:
            engine.stop()


def told(faults: list[str]) -> str:
    return f"STOKER_FUZZ_SEED={SEED} STOKER_FUZZ_COUNT={COUNT}\n" + "\n".join(faults[:40])


@pytest.mark.parametrize("path", PATHS, ids=["fast", "aiohttp"])
async def test_odd_requests_get_one_answer_and_reach_no_engine_unframed(
    tmp_path: Path, path: bytes
) -> None:
    faults: list[str] = []
    async with serving(tmp_path, ["m"]) as (stack, engine):

        async def one(case: Case) -> None:
            data, ended = await exchange(stack.url, case.pieces, CUT_S if case.cut else 20.0)
            wrong = judge.judge_request(case, data, engine.seen[case.number])
            if not ended and not case.cut and judge.read_requests(case.data).end != "short":
                wrong.append("it hangs")
            if wrong:
                faults.append(f"case {case.number} {case.names}: {wrong}\n  {case.data[:600]!r}")

        target = path.replace(b"%b", b"m")
        tries = [partial(one, case) for case in requests(SEED, COUNT, target)]
        await side_by_side(tries)
        assert len(engine.seen) > COUNT / 10, "hardly any request reached the engine"
        assert not engine.lost, told([repr(data[:300]) for data in engine.lost])
    assert not faults, told(faults)


@pytest.mark.parametrize("path", PATHS, ids=["fast", "aiohttp"])
async def test_odd_answers_arrive_whole_or_as_errors_or_break_visibly(
    tmp_path: Path, path: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((breaker, "REST_S"), (breaker, "MAX_REST_S"), (decisions, "REST_S")):
        monkeypatch.setattr(module, name, 0.05)  # else each that is tried again takes 8 s
    monkeypatch.setattr(breaker, "PROBE_S", 0.05)
    faults: list[str] = []
    says = list(answers(SEED, COUNT // 2))
    models = [f"m{answer.number}" for answer in says]
    async with serving(tmp_path, models, says) as (stack, _engine):

        async def one(answer: Answer) -> None:
            model = f"m{answer.number}"
            target = path.replace(b"%b", model.encode())
            data, ended = await exchange(stack.url, [question(answer, target, model)], DEADLINE_S)
            wrong = judge.judge_answer(answer, data) if ended else ["it hangs"]
            if wrong:
                shown = f"\n  said {answer.data[:300]!r}\n  told {data[:500]!r}"
                faults.append(f"case {answer.number} {answer.name}: {wrong}{shown}")

        await side_by_side([partial(one, answer) for answer in says])
    assert not faults, told(faults)


GOOD = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b"
ASKED = b'{"prompt": "case-0-0."}'
SENT = GOOD % (len(ASKED), ASKED)
SMUGGLED = GOOD % (2, b"{}")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LAST_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"


def asked(data: bytes, *, refused: bool = False) -> Case:
    return Case(0, ("planted",), data + LAST, [data + LAST], refused)


def test_the_judge_of_requests_is_content_with_what_is_right() -> None:
    assert judge.judge_request(asked(SENT), OK + LAST_OK, [SENT]) == []


@pytest.mark.parametrize(
    ("case", "data", "seen", "fault"),
    [
        (asked(SENT), OK + OK + LAST_OK, [SENT], "3 answers to 2"),
        (asked(SENT), OK, [SENT], "1 answers to 2 good"),
        (asked(SENT), b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", [], "a 500 of ours"),
        (asked(SENT), OK[:-1], [SENT], "the answers are short"),
        (asked(SENT), b"nonsense\r\n\r\n", [SENT], "the answers are broken"),
        (asked(SENT), OK + LAST_OK, [SENT, SMUGGLED], "nobody asked"),
        (asked(SENT), OK + LAST_OK, [SENT.replace(b"-0-0", b"-0-1")], "nobody asked"),
        (asked(SENT, refused=True), OK + LAST_OK, [SENT], "was to be refused"),
        (asked(SENT), OK + LAST_OK, [SENT.replace(b"Host: h", b"Host: h\r\nTE: a")], "hop"),
        (asked(SENT), OK + LAST_OK, [SENT.replace(b"/v1/c", b"/v2/c")], "POST /v2/completions"),
    ],
)
def test_the_judge_of_requests_sees_what_is_wrong(
    case: Case, data: bytes, seen: list[bytes], fault: str
) -> None:
    assert fault in " ".join(judge.judge_request(case, data, seen))


def said(data: bytes, end: str = "keep") -> Answer:
    return Answer(0, "good", (data,), end)


@pytest.mark.parametrize(
    ("answer", "data", "fault"),
    [
        (said(OK), OK + OK + LAST_OK, "3 answers to 2"),
        (said(OK), OK.replace(b"{}", b"[]") + LAST_OK, "the answer was changed"),
        (said(OK), b"", "a whole answer did not arrive"),
        (said(b"", "close"), b"", "neither an answer"),
        (said(OK[:-1], "close"), OK[:-1].replace(b": 2", b": 1") + LAST_OK, "half an answer"),
        (said(OK), OK.replace(b"200 OK", b"502 No") + LAST_OK, "a failure in no shape"),
        (said(OK), OK + STRAY, "no part of its answer"),
        (said(OK), OK + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "second answer is"),
        (said(OK), OK.replace(b"OK\r\n", b"OK\r\nX: case-7.\r\n") + LAST_OK, "parts of others'"),
    ],
)
def test_the_judge_of_answers_sees_what_is_wrong(answer: Answer, data: bytes, fault: str) -> None:
    assert judge.judge_answer(answer, OK + LAST_OK) == [] or answer.data != OK
    assert fault in " ".join(judge.judge_answer(answer, data))
