"""Random walks of the agent's core: whatever comes in whatever order, its invariants hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.core import messages
from agent.core.messages import (
    CommandReceived,
    ForgetRecord,
    Gone,
    HealthChanged,
    ProcessExited,
    RepointEnded,
    RepointEngine,
    ShutdownRequested,
    Signal,
    SleepEnded,
    SleepEngine,
    Spawn,
    StatusSeen,
    Tick,
    WakeEnded,
    WakeEngine,
)
from agent.core.state_machine import AgentCore
from tests.kits.agent_core_harness import SPECS, of, repoint, sleep, start, stop, wake


class AgentWalk(RuleBasedStateMachine):
    """A world of a few replicas and devices that sends whatever could happen, in any order."""

    ids = st.sampled_from(["a", "b", "c", "e"])
    devices = st.sampled_from([("d0",), ("d1",), ("d0", "d1")])

    def __init__(self) -> None:
        super().__init__()
        self.core = AgentCore(start_timeout_s=50.0, max_restarts=2, rungs=lambda spec: (1, 2))
        self.now = 0.0
        self.epoch = 1
        self.busy: dict[str, str] = {}  # replica -> what its engine was told last
        self.spawned: set[str] = set()
        self.killing: set[str] = set()
        self.last: list[messages.Effect] = []

    def give(self, event: messages.Event) -> None:
        self.last = self.core.handle(event)
        for effect in self.last:
            if isinstance(effect, Spawn):
                assert effect.replica_id not in self.spawned, "spawned before Gone"
                self.spawned.add(effect.replica_id)
            elif isinstance(effect, Signal) and effect.signal == "KILL":
                assert effect.replica_id in self.spawned, "killed without a process"
                self.killing.add(effect.replica_id)
                self.busy.pop(effect.replica_id, None)
            elif isinstance(effect, SleepEngine | WakeEngine | RepointEngine):
                assert effect.replica_id in self.spawned, "told to sleep without a process"
                assert effect.replica_id not in self.killing, "told to sleep while it is killed"
                assert effect.replica_id not in self.busy, "told twice"
                assert self.core.replicas[effect.replica_id].in_flight == 0, "a request is lost"
                self.busy[effect.replica_id] = type(effect).__name__
            elif isinstance(effect, ForgetRecord):
                assert effect.replica_id not in self.spawned, "forgotten before Gone"

    @rule(seconds=st.floats(0.0, 40.0))
    def tick(self, seconds):
        self.now += seconds
        self.give(Tick(now=self.now))

    @rule(replica_id=ids, devices=devices, newer=st.booleans())
    def start(self, replica_id, devices, newer):
        self.epoch += newer
        command = start(replica_id, self.epoch, devices)
        self.give(CommandReceived(now=self.now, command=command))

    @rule(replica_id=ids, grace_s=st.sampled_from([0.0, 5.0, 60.0]))
    def stop(self, replica_id, grace_s):
        self.give(CommandReceived(now=self.now, command=stop(replica_id, self.epoch, grace_s)))

    @rule(replica_id=ids, level=st.sampled_from([1, 2]), grace_s=st.sampled_from([0.0, 5.0, 60.0]))
    def sleep(self, replica_id, level, grace_s):
        command = sleep(replica_id, self.epoch, level, grace_s)
        self.give(CommandReceived(now=self.now, command=command))
        assert not of(self.last, Signal), "a sleep kills nothing"

    @rule(replica_id=ids)
    def wake(self, replica_id):
        self.give(CommandReceived(now=self.now, command=wake(replica_id, self.epoch)))
        assert not of(self.last, Signal), "a wake kills nothing"

    @rule(
        replica_id=ids,
        spec=st.sampled_from(SPECS),
        grace_s=st.sampled_from([0.0, 5.0, 60.0]),
    )
    def repoint(self, replica_id, spec, grace_s):
        command = repoint(replica_id, self.epoch, spec, grace_s)
        self.give(CommandReceived(now=self.now, command=command))
        assert not of(self.last, Signal), "a re-point kills nothing"

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), how=st.sampled_from(["well", "well", "wrong", "untouched"]))
    def done(self, data, how):
        replica_id = data.draw(st.sampled_from(sorted(self.busy)))
        error = None if how == "well" else "words"
        told = self.busy.pop(replica_id)
        if told != "SleepEngine":
            ended = WakeEnded if told == "WakeEngine" else RepointEnded
            self.give(ended(now=self.now, replica_id=replica_id, error=error))
            return
        untouched = how == "untouched"
        event = SleepEnded(now=self.now, replica_id=replica_id, error=error, untouched=untouched)
        self.give(event)

    @rule(replica_id=ids)
    def late_words(self, replica_id):
        """What an earlier task says of a replica that is not busy changes nothing."""
        if replica_id not in self.busy:
            before = self.phases()
            self.give(SleepEnded(now=self.now, replica_id=replica_id))
            self.give(WakeEnded(now=self.now, replica_id=replica_id, error="late"))
            self.give(RepointEnded(now=self.now, replica_id=replica_id, error="late"))
            assert self.phases() == before

    def phases(self):
        return {replica_id: r.phase for replica_id, r in self.core.replicas.items()}

    @rule(replica_id=ids, healthy=st.booleans())
    def health(self, replica_id, healthy):
        self.give(HealthChanged(now=self.now, replica_id=replica_id, healthy=healthy))

    @rule(replica_id=ids, in_flight=st.integers(0, 2))
    def status(self, replica_id, in_flight):
        event = StatusSeen(
            now=self.now, replica_id=replica_id, in_flight=in_flight, idle_for_s=None
        )
        self.give(event)

    @rule(replica_id=ids, kind=st.sampled_from(["crash", "oom", "bad_model", "exited"]))
    def exit(self, replica_id, kind):
        if replica_id in self.spawned:
            self.busy.pop(replica_id, None)
            self.give(ProcessExited(now=self.now, replica_id=replica_id, kind=kind, words="w"))

    @precondition(lambda self: self.killing)
    @rule(data=st.data())
    def gone(self, data):
        replica_id = data.draw(st.sampled_from(sorted(self.killing)))
        self.killing.discard(replica_id)
        self.spawned.discard(replica_id)
        self.give(Gone(now=self.now, replica_id=replica_id))

    @rule(hard=st.booleans())
    def shutdown(self, hard):
        if hard or self.now > 300.0:
            self.give(ShutdownRequested(now=self.now, grace_s=5.0, hard=hard))

    @invariant()
    def rules_are_kept(self):
        self.core.validate_state()
        assert {r for r, x in self.core.replicas.items() if x.tree} == self.spawned
        begun = {r for r, x in self.core.replicas.items() if x.began_at is not None}
        assert begun == set(self.busy)
        assert list(self.core.reports(self.now)) is not None

    def teardown(self):
        """Whatever happened, shutting down hard and killing all ends everything."""
        self.give(ShutdownRequested(now=self.now, grace_s=0.0, hard=True))
        while self.killing:
            replica_id = self.killing.pop()
            self.spawned.discard(replica_id)
            self.give(Gone(now=self.now, replica_id=replica_id))
        assert self.core.finished


TestAgentWalk = AgentWalk.TestCase
TestAgentWalk.settings = settings(max_examples=150, stateful_step_count=40)
