"""Hours of a bad day in minutes: callers who hang up, read slowly or send rubbish, and others.

    python bench/soak.py [--minutes 30] [--quick] [--json]

Counts answers of 5xx (none may be of the router's making: the engine behind it gives none), wrong
answers, what is still in flight once all have gone, and the router's memory after a warm-up against
the end. Loopback only, sixteen callers at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import uvloop

from bench.lib.http_load import KEY, SCARCE_KEY, request
from bench.lib.peers import python_server
from bench.lib.report import Row, print_report

CALLERS = 16
PAUSE_S = 0.05
TIMEOUT_S = 30.0
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
PATH = POST + b"Authorization: Bearer %b\r\n" % KEY.encode()
BODY = b"Content-Length: 17\r\n\r\n" + b'{"model":"bench"}'
RUBBISH = (
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST / HTTP/1.1\r\n\r\n",
    PATH + b"Content-Length: 7\r\nContent-Length: 8\r\n\r\n1234567",
    PATH + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    PATH + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    PATH + b"Content-Length: 1000000000\r\n\r\nx",
    PATH + b"Content-Length: 9\r\n\r\nnot json!",
    PATH + b"Content-Length: 16\r\n\r\n" + b'{"model":"none"}',
    PATH + b"Content-Length: 13\r\n\r\n" + b'{"model":"be\xff',
    POST + BODY,  # no key
    POST + b"X-Api-Key: sk-stoker-nobodyknow-secret\r\n" + BODY,
    POST + b"Authorization: Bearer %b\r\n" % (KEY[:-1].encode() + b"x") + BODY,
    PATH + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5\r\n\r\n--b\r\n",
)


class Day:
    """What happened so far."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.visits: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.wrong = 0

    async def visit(self, kind: str) -> None:
        """One connection, from its opening to its end."""
        self.visits[kind] += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await getattr(self, kind)(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except TimeoutError:
            self.wrong += 1
        finally:
            writer.close()

    async def unary(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(random.randint(1, 20)):
            writer.write(request("unary"))
            await self._answer(reader)

    async def chunked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = request("unary").partition(b"\r\n\r\n")[2]
        writer.write(PATH + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body))
        await asyncio.sleep(0.01)
        writer.write(body + b"\r\n0\r\n\r\n")
        await self._answer(reader)

    async def pipelined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(3 * request("unary"))
        for _ in range(3):
            await self._answer(reader)

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request(random.choice(("stream", "paced"))))
        self._count(await reader.readuntil(b"\r\n\r\n"))
        data = await reader.readuntil(b"\r\n0\r\n\r\n")
        self.wrong += data.count(b"data: ") != 64

    async def slow_reader(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("stream"))
        for _ in range(random.randint(1, 20)):
            await reader.read(512)
            await asyncio.sleep(0.1)

    async def hang_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = request(random.choice(("unary", "paced")))
        writer.write(data[: random.randint(1, len(data))])
        await asyncio.sleep(random.choice((0.0, 0.01, 0.1)))
        if random.random() < 0.5:
            writer.transport.abort()

    async def rubbish(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(random.choice(RUBBISH))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                self._count(await reader.readuntil(b"\r\n\r\n"))

    async def over_limit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A key that may call ten times a minute: it is told when to come back."""
        headers = b"Authorization: Bearer %b\r\n" % SCARCE_KEY.encode()
        for _ in range(5):
            writer.write(POST + headers + BODY)
            head = await reader.readuntil(b"\r\n\r\n")
            self._count(head)
            refused = head.startswith(b"HTTP/1.1 429 ")
            self.wrong += refused and b"\r\nRetry-After: " not in head
            length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)

    async def _answer(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self._count(head)
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
        self.wrong += not (head.startswith(b"HTTP/1.1 200 ") and b'"usage"' in body)

    def _count(self, head: bytes) -> None:
        self.statuses[int(head.split()[1])] += 1


KINDS = (
    "unary", "unary", "chunked", "pipelined", "stream", "slow_reader", "hang_up", "rubbish",
    "over_limit",
)  # fmt: skip


async def caller(day: Day, until: float) -> None:
    """Visit after visit."""
    while time.monotonic() < until:
        await day.visit(random.choice(KINDS))
        await asyncio.sleep(PAUSE_S * random.random() * 2)


async def traffic(day: Day, seconds: float) -> None:
    """Everybody, for so long."""
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        for _ in range(CALLERS):
            tasks.create_task(caller(day, until))


def still_in_flight(port: int) -> float:
    """Requests that the router counts as under way, once it had a moment."""
    deadline = time.monotonic() + 10
    while True:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics")
        asked.add_header("Authorization", "Bearer t")  # our_router's cluster token
        with urllib.request.urlopen(asked, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        left = sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(("stoker_router_in_flight{", "llm_queue_depth{"))
        )
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    seconds = 30.0 if options.quick else 60.0 * options.minutes
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-soak-")))
        engine = stack.enter_context(python_server("engine", "http_origin.py"))
        router = stack.enter_context(
            python_server("ours", "our_router.py", engine.port, folder / "ours", "log")
        )
        memory = psutil.Process(router.pid)
        day = Day(router.port)
        uvloop.run(traffic(day, seconds / 5))  # the warm-up counts too, but for memory
        before = memory.memory_info().rss
        uvloop.run(traffic(day, seconds * 4 / 5))
        left = still_in_flight(router.port)
        after = memory.memory_info().rss
    print(f"{dict(day.visits)}\n{dict(day.statuses)}", file=sys.stderr)
    total = sum(day.statuses.values())
    errors = sum(count for status, count in day.statuses.items() if status >= 500)
    print_report(
        "soak",
        [
            Row("answers of 5xx", errors, total, "all answers", "<= 0.0"),
            Row("wrong or missing answers", day.wrong, total, "all answers", "<= 0.0"),
            Row("still in flight after all have gone", left, 1.0, "one", "<= 0.0"),
            Row("RSS MB", after / 1e6, before / 1e6, "after warm-up", "<= 1.05"),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
