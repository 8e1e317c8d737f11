"""What the demo takes for shown, against a scheduler that decides what a test says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cli import showcase
from cli.client import Admin
from cli.router_client import Answer
from scheduler.admin.views import DecisionView, ReplicaView


class World:
    """Room for two models; the third takes the place of `victim` (None: no one goes)."""

    def __init__(self, victim: str | None) -> None:
        self._victim = victim
        self._ready: list[str] = []
        self._decided: list[DecisionView] = []

    async def ask(self, _router: str, _path: str, body: dict[str, Any], **_: Any) -> Answer:
        model = body["model"]
        if model not in self._ready:
            if len(self._ready) == 2 and self._victim:
                self._ready.remove(self._victim)
                self._decided.append(_evicted(self._victim, model, len(self._decided) + 1))
            self._ready.append(model)
        return Answer(text="a word", first_token_s=0.1, total_s=0.2, tokens=2)

    async def replicas(self) -> Any:
        return SimpleNamespace(value=SimpleNamespace(replicas=tuple(map(_ready, self._ready))))

    async def decisions(self, _limit: int, _model: str | None) -> Any:
        return SimpleNamespace(value=SimpleNamespace(decisions=tuple(self._decided)))


def _ready(model: str) -> ReplicaView:
    return ReplicaView(
        replica_id=f"r-{model}", model=model, node_id="n", device_ids=("d0",), device_bytes=1,
        state="ready", since_s=60.0, idle_for_s=1.0, engine="stub",
    )  # fmt: skip


def _evicted(model: str, for_model: str, number: int) -> DecisionView:
    return DecisionView(
        number=number, age_s=0.0, action="evict", model=model, replica_id=f"r-{model}",
        node_id="n", reason=f"makes room for {for_model}", cause="",
    )  # fmt: skip


async def play(monkeypatch: pytest.MonkeyPatch, victim: str | None) -> tuple[list[str], list[str]]:
    world = World(victim)
    monkeypatch.setattr(showcase, "stream_with_status", world.ask)
    shown = showcase.Showcase(cast(Admin, world), "http://router", "stub", 1.0)
    rows, problems = await shown.play(["tiny-a", "tiny-b", "tiny-c"])
    return [row.what for row in rows], problems


@pytest.mark.parametrize("victim", ["tiny-a", "tiny-b"])
async def test_which_model_makes_room_is_the_schedulers_choice(
    monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """By who was called last *and* by how long each took to start: on a busy host that is luck."""
    what, problems = await play(monkeypatch, victim)
    assert what == ["cold start", "cold start", "warm", f"cold start, evicted {victim}"]
    assert problems == []


async def test_a_demo_without_an_eviction_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    what, problems = await play(monkeypatch, None)
    assert what[-1] == "cold start"
    assert len(problems) == 1
    assert "tiny-c: expected cold start, evicted tiny-a" in problems[0]
