"""Callers of routers: a fresh connection for each call, as often as asked for, and all counted."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def call(address: str, key: str, model: str, timeout_s: float = 60) -> str:
    """One call of the router there; what was wrong with the answer, or ''."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://{address}:8080/v1/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            said = json.load(answer)
        right = said["model"] == model and said["choices"][0]["message"]["content"].split()
        return "" if right == ["hello"] * 4 else f"wrong answer: {said}"
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read()[:300]!r}"
    except (OSError, ValueError, LookupError) as error:
        return repr(error)


class Callers:
    """In a `with`: each router gets `per_second` calls a second. All have ended with the block."""

    def __init__(
        self, addresses: Sequence[str], key: str, model: str, per_second: float, timeout_s: float
    ) -> None:
        self.wrong: list[str] = []  # what came instead of a right answer, and when
        self.answered = 0
        self.slowest_s = 0.0
        self._addresses = addresses
        self._what = (key, model, timeout_s)
        self._pause_s = 1 / per_second
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=512)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def __str__(self) -> str:
        wrong = "".join(f"\n  {each}" for each in self.wrong[:20])
        return (
            f"{self.answered} calls answered, the slowest after {self.slowest_s:.1f} s;"
            f" {len(self.wrong)} failed{wrong}"
        )

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            for address in self._addresses:
                self._pool.submit(self._one, address)
            due += self._pause_s

    def _one(self, address: str) -> None:
        began, at = time.monotonic(), time.strftime("%H:%M:%S")
        wrong = call(address, *self._what)
        took_s = time.monotonic() - began
        with self._lock:
            if wrong:
                self.wrong.append(f"{at} {address} after {took_s:.1f} s: {wrong}")
            else:
                self.answered += 1
                self.slowest_s = max(self.slowest_s, took_s)
