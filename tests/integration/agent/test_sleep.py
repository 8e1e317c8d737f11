"""Sleep and wake by a real agent; its engines are stubs, which model vLLM's sleep mode."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from runtime.wire.agent_messages import SleepReplica, WakeReplica
from tests.kits.agent_process import (
    DEVICE,
    TOKEN,
    alive,
    bearer,
    processes,
    spec,
    start,
    stop,
    until,
)

GIB = 2**30
QUICK = {"start_s": 0.0, "ttft_s": 0.0, "sleep_s": 0.0, "wake_1_s": 0.0, "wake_2_s": 0.0}


def sleep(replica_id="m-1", level=1, grace_s=20.0):
    return SleepReplica(
        replica_id=replica_id, epoch=1, level=level, grace_s=grace_s, reason="a test lets it"
    )


def wake(replica_id="m-1"):
    return WakeReplica(replica_id=replica_id, epoch=1, reason="a test wants it")


def model(**engine_args):
    return spec(**QUICK | engine_args)


async def say(client, report) -> tuple[int, str]:
    """(status, text) of one completion as a router would ask for it."""
    body = {"model": "m", "prompt": "one two three", "max_tokens": 2}
    async with client.session.post(
        f"{report.base_url}/v1/completions", json=body, headers=bearer(report.key)
    ) as reply:
        return reply.status, await reply.text()


async def ready(scheduler, client, node, replica_id="m-1", **engine_args):
    await client.ok(node.url, start(replica_id, model=model(**engine_args)))
    return await scheduler.phase("ready", replica_id)


@pytest.mark.parametrize("level", [1, 2])
async def test_it_sleeps_and_wakes_and_answers_as_before(launch, scheduler, client, level):
    node = await launch()
    first = await ready(scheduler, client, node, residue_bytes=GIB, host_bytes=5 * GIB)
    assert (first.rungs, first.disabled) == ((1, 2), {})
    before = await say(client, first)
    await client.ok(node.url, sleep(level=level))
    asleep = await scheduler.phase("asleep")
    assert (asleep.sleep_level, asleep.residue_bytes) == (level, GIB)
    assert (asleep.pid, asleep.base_url, asleep.key) == (first.pid, first.base_url, first.key)
    assert asleep.sleep_s > 0
    measured = await until(
        # measured, and not only what is modelled of a sleeper
        lambda: (r := scheduler.report()).host_bytes % (5 * GIB) and r,
        "its host memory",
    )
    assert (measured.host_bytes > 5 * GIB) == (level == 1)
    assert (await say(client, asleep))[0] == 503
    await client.ok(node.url, sleep(level=3 - level))  # asleep already, at another level
    assert (await scheduler.phase("asleep")).sleep_level == level

    await client.ok(node.url, wake())
    woken = await scheduler.phase("ready")
    assert scheduler.phases()[-3:] == ["asleep", "waking", "ready"]
    assert (woken.sleep_level, woken.residue_bytes, woken.restarts) == (0, 0, 0)
    assert woken.wake_s >= sum(woken.phases.values()) - 0.01
    assert set(woken.phases) - {"wake", "reload"} == {"canary"}
    status, text = await say(client, woken)
    assert status == before[0] == 200
    assert "one two" in text
    assert woken.pid == first.pid
    async with client.session.get(f"{node.url}/metrics", headers=bearer(TOKEN)) as reply:
        metrics = await reply.text()
    for change in ("sleep", "wake"):
        labels = f'change="{change}",level="{level}",model="m",ok="1"'
        assert f"stoker_agent_rung_changes_total{{{labels}}} 1.0" in metrics


async def test_the_canary_is_no_traffic_and_a_start_tells_its_phases(launch, scheduler, client):
    node = await launch()
    await ready(scheduler, client, node)
    told = await until(lambda: (r := scheduler.report()).phases and r, "its phases")
    assert set(told.phases) <= {"fork", "other", "canary"}
    # The canary is asked once the replica is ready, and takes its time on a busy machine.
    took_s = sum(s for phase, s in told.phases.items() if phase != "canary")
    assert took_s == pytest.approx(told.start_s, abs=0.5)
    await client.ok(node.url, sleep())
    await scheduler.phase("asleep")
    await client.ok(node.url, wake())
    await scheduler.phase("ready")
    seen = len(scheduler.heartbeats)
    await until(lambda: len(scheduler.heartbeats) > seen + 8, "it to be looked at again")
    assert scheduler.report().idle_for_s is None, "it has had no request"
    assert scheduler.heartbeats[-1].host_budget_bytes > 0
    assert 0 < scheduler.report().host_bytes < scheduler.heartbeats[-1].host_memory_total_bytes


async def test_a_sleep_waits_for_the_request_in_flight(launch, scheduler, client):
    node = await launch()
    first = await ready(scheduler, client, node, token_s=0.05)
    request = asyncio.create_task(client.complete(first, max_tokens=40))
    await until(lambda: scheduler.report().in_flight == 1, "the request to be in flight")
    await client.ok(node.url, sleep())
    await scheduler.phase("draining")
    assert not request.done()
    assert await request == 40
    await scheduler.phase("asleep")
    assert scheduler.phases() == ["starting", "ready", "draining", "sleeping", "asleep"]


async def test_a_sleep_ends_no_request_when_its_grace_is_over(launch, scheduler, client):
    node = await launch()
    first = await ready(scheduler, client, node, token_s=0.05)
    request = asyncio.create_task(client.complete(first, max_tokens=60))
    await until(lambda: scheduler.report().in_flight == 1, "the request to be in flight")
    await client.ok(node.url, sleep(grace_s=0.3))
    await scheduler.phase("draining")
    serving = await scheduler.phase("ready")
    assert "1 requests were in flight" in serving.reason
    assert not request.done()
    assert await request == 60
    assert (await say(client, serving))[0] == 200


async def test_a_wake_cancels_a_sleep_that_still_drains(launch, scheduler, client):
    node = await launch()
    first = await ready(scheduler, client, node, token_s=0.05)
    request = asyncio.create_task(client.complete(first, max_tokens=40))
    await until(lambda: scheduler.report().in_flight == 1, "the request to be in flight")
    await client.ok(node.url, sleep())
    await scheduler.phase("draining")
    await client.ok(node.url, wake())
    serving = await scheduler.phase("ready")
    assert await request == 40
    assert (await say(client, serving))[0] == 200
    assert "sleeping" not in scheduler.phases()


async def test_a_wake_while_it_falls_asleep_follows_at_once(launch, scheduler, client):
    node = await launch()
    await ready(scheduler, client, node, sleep_s=0.5)
    await client.ok(node.url, sleep())
    await scheduler.phase("sleeping")
    await client.ok(node.url, wake())
    woken = await scheduler.phase("ready")
    assert woken.wake_s is not None
    assert (await say(client, woken))[0] == 200


@pytest.mark.parametrize("level", [1, 2])
async def test_gibberish_after_a_wake_costs_a_restart_and_the_rung(
    launch, scheduler, client, level
):
    node = await launch()
    first = await ready(scheduler, client, node, wake_gibberish=True)
    await client.ok(node.url, sleep(level=level))
    await scheduler.phase("asleep")
    await client.ok(node.url, wake())
    await until(lambda: scheduler.report().restarts == 1, "a restart")
    again = await scheduler.phase("ready")
    assert again.pid != first.pid
    assert not alive(first.pid)
    told = [r for h in scheduler.heartbeats for r in h.replicas]
    assert all(r.phase != "ready" for r in told if r.pid == first.pid and r.wake_s)
    failed = next(r for r in told if r.phase == "backoff")
    assert failed.exit_kind == "wake_failed"
    assert "canary" in failed.reason
    assert "'!'" in again.disabled[f"asleep-{level}"]
    assert again.rungs == (3 - level,)
    assert "one two" in (await say(client, again))[1]

    for agent in (node, None):
        if agent is None:
            await node.kill()
            scheduler.heartbeats.clear()
            agent = await launch()
            adopted = await scheduler.phase("ready")
            assert (adopted.pid, adopted.disabled) == (again.pid, again.disabled)
        status, reply = await client.send(agent.url, sleep(level=level))
        assert (status, reply.ok) == (200, False)
        assert f"asleep-{level}" in reply.error
        assert "canary" in reply.error
    assert (await say(client, adopted))[0] == 200


async def test_what_cannot_sleep_says_so_and_serves_on(launch, scheduler, client):
    node = await launch()
    told = await ready(scheduler, client, node, rungs=[])
    assert told.rungs == ()
    status, reply = await client.send(node.url, sleep())
    assert (status, reply.ok) == (200, False)
    assert "no sleep level 1" in reply.error
    assert (await say(client, told))[0] == 200


async def test_stop_while_asleep_leaves_nothing(launch, scheduler, client):
    node = await launch()
    first = await ready(scheduler, client, node)
    await client.ok(node.url, sleep())
    await scheduler.phase("asleep")
    await client.ok(node.url, stop())
    await scheduler.phase(None)
    assert not alive(first.pid)
    assert processes(node.config) == {}
    assert list((node.config.registry_file().parent / "replicas").iterdir()) == []


async def test_an_engine_that_dies_asleep_is_reported_and_not_started_again(
    launch, scheduler, client
):
    node = await launch()
    first = await ready(scheduler, client, node)
    await client.ok(node.url, sleep())
    await scheduler.phase("asleep")
    os.kill(first.pid, signal.SIGKILL)
    dead = await scheduler.phase("failed")
    assert (dead.sleep_level, dead.disabled, dead.exit_kind) == (0, {}, "killed")
    await client.ok(node.url, stop())
    await scheduler.phase(None)
    assert processes(node.config) == {}


async def test_wakes_wait_for_a_start_that_must_be_alone(launch, scheduler, client):
    node = await launch()
    slow = {"sleep_s": 0.4, "wake_1_s": 0.4}
    await ready(scheduler, client, node, "m-1", **slow)
    await ready(scheduler, client, node, "m-2", **slow)
    for n in (1, 2):
        await client.ok(node.url, sleep(f"m-{n}"))
    for n in (1, 2):
        await scheduler.phase("asleep", f"m-{n}")
    await client.ok(node.url, start("m-3", model=model(start_s=0.8)))
    for n in (1, 2):
        await client.ok(node.url, wake(f"m-{n}"))
    reports = [await scheduler.phase("ready", f"m-{n}") for n in (1, 2, 3)]
    assert {r.device_ids for r in reports} == {(DEVICE,)}
    # each wake began after the start had ended: nobody's clock ran while it waited
    last = {r.replica_id: r for r in scheduler.heartbeats[-1].replicas}
    for n in (1, 2):
        woken = last[f"m-{n}"]
        assert woken.wake_s >= 0.4
        assert woken.phase_age_s + woken.wake_s <= last["m-3"].phase_age_s + 0.05


async def test_a_sleeper_outlives_its_agent_and_is_adopted_asleep(launch, scheduler, client):
    node = await launch()
    first = await ready(scheduler, client, node, residue_bytes=GIB)
    await client.ok(node.url, sleep(level=2))
    asleep = await scheduler.phase("asleep")
    await node.kill()
    scheduler.heartbeats.clear()
    successor = await launch()
    adopted = await scheduler.phase("asleep")
    assert scheduler.phases() == ["asleep"]
    assert (adopted.pid, adopted.sleep_level, adopted.residue_bytes) == (first.pid, 2, GIB)
    assert (adopted.rungs, adopted.sleep_s) == ((1, 2), asleep.sleep_s)
    await client.ok(successor.url, wake())
    woken = await scheduler.phase("ready")
    assert woken.pid == first.pid
    assert "canary" in woken.phases
    assert (await say(client, woken))[0] == 200


@pytest.mark.parametrize("mad", [False, True])
async def test_one_that_woke_without_an_agent_passes_its_canary_first(
    launch, scheduler, client, tmp_path, mad
):
    node = await launch()
    first = await ready(scheduler, client, node, wake_1_s=1.0, wake_gibberish=mad)
    await client.ok(node.url, sleep())
    await scheduler.phase("asleep")
    await client.ok(node.url, wake())
    await scheduler.phase("waking")
    await node.kill()
    scheduler.heartbeats.clear()
    record = tmp_path / "state" / "replicas" / "m-1.json"
    control_key = json.loads(record.read_text())["control_key"]

    async def awake() -> bool:
        async with client.session.get(
            f"{first.base_url}/is_sleeping", headers=bearer(control_key)
        ) as reply:
            return not (await reply.json())["is_sleeping"]

    while not await awake():
        await asyncio.sleep(0.02)
    assert (await say(client, first))[0] == 503, "its door is shut until its canary passed"
    await launch()
    if mad:
        await until(lambda: scheduler.report() and scheduler.report().restarts, "a restart")
    woken = await scheduler.phase("ready")
    assert mad or set(woken.phases) == {"canary"}
    assert (woken.pid == first.pid) != mad
    assert bool(woken.disabled) == mad
    assert (await say(client, woken))[0] == 200
