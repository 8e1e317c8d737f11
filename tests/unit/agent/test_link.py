"""The agent's tie to the scheduler ends when it is told to, whatever comes in the same moment."""

from __future__ import annotations

import asyncio

from agent.link import SchedulerLink


async def test_a_heartbeat_that_is_due_does_not_swallow_the_end() -> None:
    """Seen once: asyncio.wait_for of Python 3.11 returned, its cancellation was lost, and an agent
    that had stopped all its engines ran on forever."""
    sent = 0

    async def send() -> bool:
        nonlocal sent
        sent += 1
        return True

    for turns in range(6):  # the cancellation in each of the turns that the poke takes
        due = asyncio.Event()
        link = SchedulerLink(
            None, None, leader_key="", token="", interval_s=60.0, due=due, build=None, on_reply=None
        )
        link.send = send  # type: ignore[method-assign]
        task = asyncio.create_task(link.run())
        await asyncio.sleep(0.01)
        due.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1.0)
        assert done, f"cancelled {turns} turns after the poke, it runs on"
    assert sent >= 6
