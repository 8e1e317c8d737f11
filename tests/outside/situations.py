"""What each client is put through, and what is right.

Rule this file keeps: what counts is what the client's own library tells its user. A failure that
arrives as an empty answer, or an answer cut short that arrives as a whole one, is wrong whatever
the bytes were.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.kits.cluster import Cluster, wait_until
from tests.outside.talk import Asked, Told

ANSWERS, REFUSALS, FAILURES = "Answers", "Refusals", "Failures, and a caller who hangs up"
WORDS = "one two three"
MAX_TOKENS = 6  # more than the words, after which the model ends by itself
GIB = 2**30
_numbers = itertools.count()


@dataclass(frozen=True)
class Situation:
    """One column of one of the tables.

    `table` is that one's title; `model` sets the model up and yields its name; `right` raises
    AssertionError where what the client was told is not right.
    """

    table: str
    title: str
    model: Callable[[Cluster], contextlib.AbstractContextManager[str]]
    right: Callable[[Told], None]
    stream: bool = False
    fields: dict[str, Any] = field(default_factory=dict)  # of the Asked

    def asked(self, base_url: str, key: str, model: str, api: str) -> Asked:
        made = Asked(base_url, key, model, WORDS, MAX_TOKENS, self.stream, None, api)
        return made._replace(**self.fields)


# -------------------------------------------------------------------------------- models


@contextlib.contextmanager
def _named(cluster: Cluster, name: str, gib: int = 2, **fields: Any) -> Iterator[str]:
    """A model of that name, for this call only."""
    cluster.add_stub(name, gib, **fields)
    try:
        yield name
    finally:
        cluster.admin("DELETE", f"/admin/models/{name}")


@contextlib.contextmanager
def _standing(name: str) -> Iterator[str]:
    yield name


def _cold(cluster: Cluster) -> contextlib.AbstractContextManager[str]:
    return _named(
        cluster, f"cold-{next(_numbers)}", engine_args={"start_s": 1.5, "says_once": True}
    )


def _broken(cluster: Cluster) -> contextlib.AbstractContextManager[str]:
    args = {"start_s": 0.5, "fail_start": "bad_model"}
    return _named(cluster, f"broken-{next(_numbers)}", engine_args=args)


def _too_large(cluster: Cluster) -> contextlib.AbstractContextManager[str]:
    return _named(cluster, f"large-{next(_numbers)}", gib=900)


@contextlib.contextmanager
def _dying(cluster: Cluster) -> Iterator[str]:
    """Its engine is killed after it has begun to answer."""
    args = {"start_s": 0, "token_s": 0.3}
    with _named(cluster, f"dying-{next(_numbers)}", engine_args=args, max_replicas=1) as name:
        over = threading.Event()

        def kill() -> None:
            while not over.wait(0.1):
                for replica in cluster.replicas(name):
                    if replica["in_flight"]:
                        over.wait(1.0)
                        for pid in _pids(cluster, name):
                            with contextlib.suppress(ProcessLookupError):
                                pid.kill()
                        return

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            yield name
        finally:
            over.set()
            thread.join()


def _pids(cluster: Cluster, model: str) -> list[Any]:
    import psutil

    return [psutil.Process(r["pid"]) for r in cluster.replicas(model) if r["pid"]]


@contextlib.contextmanager
def _left_alone(cluster: Cluster) -> Iterator[str]:
    """A slow answer that its caller does not wait for: nothing may stay in flight."""
    args = {"start_s": 0, "token_s": 2.0}
    with _named(cluster, f"slow-{next(_numbers)}", engine_args=args) as name:
        yield name

        def idle() -> bool:
            shown = cluster.admin("GET", f"/admin/models/{name}")
            return shown["in_flight"] == 0 and shown["waiting"] == 0

        wait_until(idle, "nothing in flight after the caller hung up", 20.0)


# -------------------------------------------------------------------------------- what is right


def _answered(told: Told) -> None:
    assert told.error is None, f"an error instead of an answer: {told.error}"
    assert told.text == WORDS, f"another text: {told.text!r}"


def _streamed(told: Told) -> None:
    _answered(told)
    assert told.pieces > 1, "it did not come in pieces"


def _failed(*words: str, status: int | None = None, within_s: float = 30.0) -> Any:
    def right(told: Told) -> None:
        assert told.error is not None, f"a failure was taken for an answer: {told.text!r}"
        message = told.error["message"]
        assert any(word in message for word in words), f"says nothing of {words}: {message!r}"
        if status is not None and told.error["status"] is not None:
            assert told.error["status"] == status, told.error
        assert told.took_s < within_s, f"told after {told.took_s} s"

    return right


def _broken_off(told: Told) -> None:
    assert told.error is not None, f"an answer cut short looks whole: {told.text!r}"


SITUATIONS = {
    "warm": Situation(ANSWERS, "warm", lambda c: _standing("warm"), _answered),
    "warm_stream": Situation(
        ANSWERS, "warm, streamed", lambda c: _standing("warm"), _streamed, True
    ),
    "cold": Situation(ANSWERS, "cold", _cold, _answered),
    "cold_stream": Situation(ANSWERS, "cold, streamed", _cold, _streamed, True),
    "wrong_key": Situation(
        REFUSALS, "wrong key", lambda c: _standing("warm"), _failed("API key", status=401),
        fields={"key": "sk-stoker-0123456789abcdef-wrong"},
    ),
    "unknown": Situation(
        REFUSALS, "unknown model", lambda c: _standing("wram"), _failed("wram", status=404),
    ),
    "refused": Situation(
        REFUSALS, "refused: never fits", _too_large, _failed("900", "GiB", status=503),
    ),
    "refused_stream": Situation(
        REFUSALS, "refused, streamed", _too_large, _failed("900", "GiB"), True
    ),
    "start_fails": Situation(
        FAILURES, "start fails", _broken, _failed("weights", "start", within_s=60.0)
    ),
    "start_fails_stream": Situation(
        FAILURES, "start fails, streamed", _broken, _failed("weights", "start", within_s=60.0), True
    ),
    "dies": Situation(
        FAILURES, "engine dies in the middle", _dying, _broken_off, True, {"max_tokens": 40}
    ),
    "hang_up": Situation(
        FAILURES, "hangs up", _left_alone, _failed("", within_s=60.0), fields={"timeout_s": 2.0}
    ),
}  # fmt: skip
