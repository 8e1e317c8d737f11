"""What the demo does to a running cluster: one model more than fits, asked in an order that shows
a cold start, a warm call, and an eviction. Nothing is asserted that was not seen."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import aiohttp
import click
from msgspec import Struct

from cli.client import Admin
from cli.invoke import stream_with_status
from cli.router_client import Answer, ask_body
from cli.text import size, waiting
from runtime.places import url
from runtime.sockets import tcp_connector
from runtime.wire.agent_messages import DeviceReport
from runtime.wire.model_spec import ModelSpec
from scheduler.admin.views import DecisionView, ReplicaView

_ENGINE_S = 60.0  # how long a node may take to find its engines
_SETTLE_S = 60.0  # how long what was done may take to be seen
_POLL_S = 0.2
_MAX_TOKENS = 24
_PROMPT = "Tell me a story."
_REPLY_CHARS = 32


class Row(Struct, frozen=True, kw_only=True):
    """One call and what it did."""

    model: str
    what: str
    first_token_s: float
    total_s: float
    tokens: int
    reply: str
    engine: str
    device: str


def plan(devices: list[DeviceReport]) -> tuple[int, int]:
    """(how many models, the bytes each books) so that exactly all but one fit on `devices`.

    Two on one device, else one on each; worked example: one device of 24 GiB gives three models of
    9.6 GiB, four of 80 GiB give five of 48 GiB. Raises click.ClickException without a device.
    """
    if not devices:
        raise click.ClickException("no healthy device; see `stoker devices` and the agent's log")
    room = min(d.memory_total_bytes - d.foreign_bytes for d in devices)
    share = 0.4 if len(devices) == 1 else 0.6
    return max(2, len(devices)) + 1, int(room * share)


async def add_models(admin: Admin, router: str, engine: str, folder: Path) -> list[str]:
    """Write the models (for a real engine) and add them; their names, once the router has them."""
    await _until_engine(admin, engine)
    views = (await admin.devices()).value.devices
    count, book_bytes = plan([d.report for d in views if d.report.healthy])
    names = [f"tiny-{chr(ord('a') + i)}" for i in range(count)]
    if engine == "vllm":
        await _write_models(folder, names)
    for name in names:
        await admin.put(_spec(name, engine, folder, book_bytes))
    await _until_routed(router, names)
    each = f"{size(book_bytes)} each, so {count - 1} fit"
    click.echo(f"added {', '.join(names)}: {each}", err=True)
    return names


def _spec(name: str, engine: str, folder: Path, book_bytes: int) -> ModelSpec:
    args: dict[str, Any] = {"start_s": 1.5, "ttft_s": 0.02, "token_s": 0.01}
    if engine == "vllm":
        args = {"enforce_eager": True, "max_model_len": 512}
    return ModelSpec(
        name=name,
        source=str(folder / name),
        engine="vllm" if engine == "vllm" else "stub",
        engine_args=args,
        device_memory_bytes=book_bytes,
        idle_s=3600.0,
    )


async def _until_engine(admin: Admin, engine: str) -> None:
    with waiting(f"looking for the engine {engine} on this host"):
        deadline = time.monotonic() + _ENGINE_S
        while time.monotonic() < deadline:
            if any(engine in node.engines for node in (await admin.nodes()).value.nodes):
                return
            await asyncio.sleep(_POLL_S)
    raise click.ClickException(
        f"no engine {engine!r} in this Python's environment; `make setup` installs it"
    )


async def _until_routed(router: str, names: list[str]) -> None:
    """A router hears of a new model a moment after the scheduler has it."""
    deadline = time.monotonic() + _SETTLE_S
    async with aiohttp.ClientSession(connector=tcp_connector()) as session:
        while time.monotonic() < deadline:
            async with session.get(url(router, "v1", "models")) as answer:
                listed = await answer.json()
            if set(names) <= {model["id"] for model in listed.get("data", ())}:
                return
            await asyncio.sleep(_POLL_S)
    raise click.ClickException(f"the router at {router} has not heard of the models")


async def _write_models(folder: Path, names: list[str]) -> None:
    with waiting(f"writing {len(names)} tiny models to {folder}"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "runtime.checkpoints.tiny_models", str(folder), *names,
            stdout=PIPE, stderr=PIPE,
        )  # fmt: skip
        _, errors = await process.communicate()
    if process.returncode:
        words = errors.decode(errors="replace").strip().splitlines()[-3:]
        raise click.ClickException("the tiny models can't be written:\n" + "\n".join(words))


class Showcase:
    """Asks the models and notes what each call did."""

    def __init__(self, admin: Admin, router: str, engine: str, dwell_s: float) -> None:
        self._admin = admin
        self._router = router
        self._engine = engine
        self._dwell_s = dwell_s
        self._rows: list[Row] = []
        self._problems: list[str] = []

    async def play(self, models: list[str]) -> tuple[list[Row], list[str]]:
        """(what happened, what should have but did not).

        Every model but the last is started, the first is asked again, and the last needs the room
        of one of the others. Which one is the scheduler's choice: mostly the one that nobody asked
        for longest, but one that was measured to start much more quickly goes before it.
        """
        *first, last = models
        for model in first:
            await self._call(model, "cold start")
        await self._call(first[0], "warm")
        await self._until_all_may_go(first)
        await self._call(last, *(f"cold start, {how}" for m in first for how in _made_room(m)))
        return self._rows, self._problems

    async def _call(self, model: str, *expected: str) -> None:
        before = {r.replica_id for r in await self._replicas() if r.state == "ready"}
        decided = max((d.number for d in await self._decisions()), default=0)
        path, body = ask_body(model, _PROMPT, _MAX_TOKENS, raw=False)
        # A random model may well say its end-of-text token first, or one token without end.
        body |= {"temperature": 1.0, "seed": 7, "ignore_eos": True}
        answer = await stream_with_status(self._router, path, body, show=False)
        replica = await self._replica_of(model)
        new = [d for d in await self._decisions() if d.number > decided and d.action == "evict"]
        asleep = {r.replica_id for r in await self._replicas() if r.sleep_level}
        what = "warm" if replica.replica_id in before else "cold start"
        for evicted in new:
            what += f", {_made_room(evicted.model)[evicted.replica_id in asleep]}"
        if what not in expected:
            self._problems.append(f"{model}: expected {' or '.join(expected)}; it was: {what}")
        self._note(model, what, answer, replica)

    async def _until_all_may_go(self, models: list[str]) -> None:
        """Until each has served for the dwell time and is idle: then the scheduler can choose."""
        stay: list[str] = []
        with waiting("giving each a moment"):
            deadline = time.monotonic() + _SETTLE_S
            while time.monotonic() < deadline:
                mine = [r for r in await self._replicas() if r.model in models]
                stay = [r.model for r in mine if not self._may_go(r)]
                if not stay:
                    return
                await asyncio.sleep(_POLL_S)
        self._problems.append(f"not idle {_SETTLE_S:.0f} s after their calls: {', '.join(stay)}")

    def _may_go(self, replica: ReplicaView) -> bool:
        return replica.since_s > self._dwell_s and not replica.in_flight

    def _note(self, model: str, what: str, answer: Answer, replica: ReplicaView) -> None:
        if not answer.tokens or not answer.text or answer.first_token_s is None:
            self._problems.append(f"{model} answered without a single token")
        if replica.engine != self._engine:
            self._problems.append(f"{model} was answered by the engine {replica.engine}")
        version = f" {replica.engine_version}" if replica.engine_version else ""
        self._rows.append(
            Row(
                model=model,
                what=what,
                first_token_s=answer.first_token_s or answer.total_s,
                total_s=answer.total_s,
                tokens=answer.tokens or 0,
                reply=_shown(answer.text),
                engine=replica.engine + version,
                device=", ".join(replica.device_ids),
            )
        )

    async def _replicas(self) -> tuple[ReplicaView, ...]:
        return (await self._admin.replicas()).value.replicas

    async def _replica_of(self, model: str) -> ReplicaView:
        """The replica that answered."""
        for replica in await self._replicas():
            if replica.model == model and replica.state == "ready":
                return replica
        raise click.ClickException(f"{model} answered, but no replica of it is ready")

    async def _decisions(self) -> tuple[DecisionView, ...]:
        return (await self._admin.decisions(100, None)).value.decisions


def _made_room(model: str) -> tuple[str, str]:
    """What a row says of a model that was stopped for another, and of one that sleeps."""
    return f"evicted {model}", f"put {model} to sleep"


def _shown(text: str) -> str:
    """The first words, with nothing that could disturb a terminal or a table."""
    plain = "".join(c if c.isascii() and c.isprintable() else "·" for c in text)
    short = " ".join(plain.split())
    return short if len(short) <= _REPLY_CHARS else short[: _REPLY_CHARS - 1] + "…"
