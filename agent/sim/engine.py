"""One engine of a simulated node: its requests and the memory it really holds. Pure.

Rules this file keeps:
- a request is prefilled after those before it, then decodes with the others; the speed it gets is
  that of the batch it joins (docs/simulator.md says what this leaves out);
- a request begun ends once: done, broken when the engine dies, or silent when its host vanishes;
- the door is the guard's (runtime/engine/guard.py): shut before a sleep, open after the canary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from runtime.sim.loop import Loop
from runtime.sim.observer import Job
from runtime.sim.timings import Timings
from runtime.wire.agent_messages import StartReplica

# refused: nothing listens there; silent: its host vanished, so that nothing is heard at all
# stranger: it serves another model by now, so that the key of an old route table opens nothing
Answer = Literal["taken", "refused", "closed", "silent", "stranger"]


class SimEngine:
    """`held`: bytes on each of its devices; `offloaded`: weights in host memory."""

    def __init__(
        self,
        loop: Loop,
        timings: Timings,
        command: StartReplica,
        changed: Callable[[SimEngine], object],
    ) -> None:
        """`changed` is called when a request began or ended."""
        self.command = command
        self.listens = False  # its process serves HTTP
        self.open = True
        self.alive = True
        self.asleep = False  # by its own word: also on its way there, and until it is awake
        self.process = False  # there is a process; until then its files are looked for
        self.held = 0
        self.offloaded = 0
        self.rung = "cached"  # where its weights were when it was started
        self.last_end: float | None = None
        self.healthy = True
        self._loop = loop
        self._timings = timings
        self._changed = changed
        self._active: dict[int, tuple[Job, float]] = {}  # number -> its first token's time
        self._queue: deque[Job] = deque()
        self._max_batch = timings.of(command.spec).max_batch
        self._prefilled_at = 0.0
        self._made = 0

    @property
    def in_flight(self) -> int:
        """Requests it has."""
        return len(self._active) + len(self._queue)

    @property
    def waiting(self) -> int:
        """Of these, in its own queue."""
        return len(self._queue)

    def submit(self, job: Job) -> Answer:
        """Take a request in."""
        if not self.listens:
            return "refused"
        if job.model != self.command.spec.name:
            return "stranger"
        if not self.open:
            return "closed"
        if len(self._active) >= self._max_batch:
            self._queue.append(job)
        else:
            self._begin(job)
        self._changed(self)
        return "taken"

    def drop(self, job: Job) -> None:
        """Forget a request whose caller hung up."""
        if job in self._queue:
            self._queue.remove(job)
        for number, (active, _) in list(self._active.items()):
            if active is job:
                del self._active[number]
                self._next()
        self.last_end = self._loop.now
        self._changed(self)

    def die(self) -> None:
        """Every request breaks off."""
        if not self.alive:
            return
        self.alive = self.listens = False
        active, queue = list(self._active.values()), list(self._queue)
        self._active, self._queue = {}, deque()
        now = self._loop.now
        for job, first_at in active:
            job.broken(first_at if first_at <= now else None)
        for job in queue:
            job.broken(None)

    def fall_silent(self) -> None:
        """Lose every request without a word: the host vanishes."""
        jobs = [*(job for job, _ in self._active.values()), *self._queue]
        self._active, self._queue = {}, deque()
        for job in jobs:
            job.silent()

    def _begin(self, job: Job) -> None:
        now, spec = self._loop.now, self.command.spec
        self._made += 1
        step_s = self._timings.step_s(spec, len(self._active) + 1)
        prefill_s = self._timings.prefill_s(spec, job.prompt_tokens)
        self._prefilled_at = max(now, self._prefilled_at) + prefill_s
        first_at = job.first_due = self._prefilled_at + step_s
        self._active[self._made] = (job, first_at)
        ends_at = first_at + step_s * max(0, job.output_tokens - 1)
        self._loop.at(ends_at, self._end, self._made)

    def _end(self, number: int) -> None:
        found = self._active.pop(number, None)
        if found is None:
            return  # it broke off, or its caller left
        job, first_at = found
        self.last_end = self._loop.now
        self._next()
        job.done(first_at)
        self._changed(self)

    def _next(self) -> None:
        if self._queue and len(self._active) < self._max_batch:
            self._begin(self._queue.popleft())
