"""Which piece of waiting work goes next."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.router.jobs.plan import BREAKS_MAX, REST_MAX_S, REST_S, Item, Plan


def plan_of(*items: Item, limit: int = 8, first: int = 8) -> Plan:
    plan = Plan(limit, first)
    for item in items:
        plan.add(item)
    return plan


def items(owner: int, count: int, tenant: str = "t", model: str = "m") -> list[Item]:
    return [Item(owner, line, tenant, model) for line in range(1, count + 1)]


def sent(plan: Plan, now: float = 0.0) -> list[Item]:
    found = []
    while (item := plan.next(now)) is not None:
        found.append(item)
    return found


def test_lines_go_in_order_and_no_more_than_the_limit() -> None:
    plan = plan_of(*items(1, 12), limit=5)
    assert [item.line for item in sent(plan)] == [1, 2, 3, 4, 5]
    plan.ended((1, 3), "answered", 1.0)
    assert [item.line for item in sent(plan)] == [6]


def test_a_model_begins_with_one_and_gets_one_more_with_each_answer() -> None:
    plan = plan_of(*items(1, 20), limit=3, first=1)
    assert len(sent(plan)) == 1
    plan.ended((1, 1), "answered", 0.0)
    assert len(sent(plan)) == 2
    plan.ended((1, 2), "answered", 0.0)
    plan.ended((1, 3), "answered", 0.0)
    assert len(sent(plan)) == 3


def test_tenants_take_turns_and_an_older_batch_goes_first() -> None:
    plan = plan_of(*items(2, 3, "a"), *items(1, 2, "a"), *items(3, 9, "b"), limit=6)
    assert [(i.tenant, i.owner) for i in sent(plan)] == [
        ("a", 1), ("b", 3), ("a", 1), ("b", 3), ("a", 2), ("b", 3),
    ]  # fmt: skip


def test_who_fills_the_limit_keeps_no_other_tenant_out() -> None:
    plan = plan_of(*items(1, 20, "a"), limit=4)
    assert len(sent(plan)) == 4
    for item in (*items(2, 9, "b"), *items(3, 9, "c")):
        plan.add(item)
    assert [i.tenant for i in sent(plan)] == ["b", "c"]
    for line in range(1, 5):
        plan.ended((1, line), "answered", 0.0)
    assert sorted(i.tenant for i in sent(plan)) == ["a", "b"]


def test_a_paused_tenants_pieces_wait_and_no_others() -> None:
    plan = plan_of(*items(1, 2, "a"), *items(2, 2, "b"))
    plan.paused = frozenset({"a"})
    assert [i.tenant for i in sent(plan)] == ["b", "b"]
    plan.paused = frozenset()
    assert [i.tenant for i in sent(plan)] == ["a", "a"]


def test_a_refusal_of_one_tenant_says_nothing_of_another() -> None:
    plan = plan_of(*items(1, 3, "over its limit"), *items(2, 3, "other"), first=1)
    sent(plan)
    plan.ended((1, 1), "refused", 0.0, 60.0)
    plan.ended((2, 1), "answered", 0.0)
    assert [(i.owner, i.line) for i in sent(plan)] == [(2, 2), (2, 3)]


def test_a_model_that_rests_stops_no_other() -> None:
    plan = plan_of(*items(1, 3, model="cold"), *items(2, 3, model="hot"), first=1)
    assert [i.model for i in sent(plan)] == ["cold", "hot"]
    plan.ended((1, 1), "refused", 0.0)
    plan.ended((2, 1), "answered", 0.0)
    assert [(i.model, i.line) for i in sent(plan)] == [("hot", 2), ("hot", 3)]
    assert plan.due_at(0.0) == REST_S
    assert [(i.model, i.line) for i in sent(plan, REST_S)] == [("cold", 1)]


def test_refusals_in_a_row_rest_longer_and_those_of_one_moment_count_once() -> None:
    plan = plan_of(*items(1, 8))
    sent(plan)
    for line in range(1, 9):
        plan.ended((1, line), "refused", 10.0)
    now, pauses = 10.0, []
    for _ in range(9):
        due = plan.due_at(now)
        assert due is not None
        pauses.append(due - now)
        now = due
        (probe,) = sent(plan, now)
        plan.ended(probe[:2], "refused", now)
    assert pauses == [1, 2, 4, 8, 16, 32, REST_MAX_S, REST_MAX_S, REST_MAX_S]


def test_retry_after_is_kept_to() -> None:
    plan = plan_of(*items(1, 1))
    sent(plan)
    plan.ended((1, 1), "refused", 0.0, 20.0)
    assert plan.due_at(0.0) == 20.0


def test_only_what_breaks_again_and_again_is_given_up_on() -> None:
    plan = plan_of(*items(1, 1))
    now = 0.0
    for _ in range(20):  # refusals never count
        assert sent(plan, now)
        assert not plan.last_try((1, 1))
        plan.ended((1, 1), "refused", now)
        now += REST_MAX_S
    for attempt in range(1, BREAKS_MAX + 1):
        assert sent(plan, now)
        assert plan.last_try((1, 1)) == (attempt == BREAKS_MAX)
        plan.ended((1, 1), "given up" if plan.last_try((1, 1)) else "broken", now)
        now += REST_MAX_S
    assert sent(plan, now) == []
    assert plan.due_at(0.0) is None


def test_an_owner_that_is_dropped_leaves_nothing() -> None:
    plan = plan_of(*items(1, 3), *items(2, 1), limit=2)
    sent(plan)
    flying = plan.drop(1)
    assert flying == [(1, 1), (1, 2)]
    for key in flying:
        plan.gone(key)
    assert [(i.owner, i.line) for i in sent(plan)] == [(2, 1)]


class Machine(RuleBasedStateMachine):
    """Whatever happens, each piece is in one place and the limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Plan(4, 1)
        self.left: set[tuple[int, int]] = set()
        self.line = 0
        self.now = 0.0

    @rule(owner=st.integers(1, 3), model=st.sampled_from("xyz"))
    def add(self, owner: int, model: str) -> None:
        self.line += 1
        self.left.add((owner, self.line))
        self.plan.add(Item(owner, self.line, f"t{owner % 2}", model))

    @rule()
    def send(self) -> None:
        self.plan.next(self.now)

    @rule(s=st.floats(0.0, 100.0))
    def wait(self, s: float) -> None:
        self.now += s

    @precondition(lambda self: self.plan.in_flight)
    @rule(data=st.data(), how=st.sampled_from(["answered", "refused", "broken", "given up"]))
    def end(self, data: st.DataObject, how: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.plan.in_flight)))
        self.plan.ended(key, how, self.now)
        if how in ("answered", "given up"):
            self.left.discard(key)

    @rule(owner=st.integers(1, 3))
    def drop(self, owner: int) -> None:
        for key in self.plan.drop(owner):
            self.plan.gone(key)
        self.left = {key for key in self.left if key[0] != owner}

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        waiting = sum(self.plan.waiting(owner) for owner in (1, 2, 3))
        assert waiting + len(self.plan.in_flight) == len(self.left)
        assert set(self.plan.in_flight) <= self.left
        assert len(self.plan.in_flight) <= 4 + 1  # one of a tenant with none there

    def teardown(self) -> None:
        """What is left can all be sent and answered."""
        for _ in range(20 * len(self.left) + 20):
            self.now += REST_MAX_S
            while self.plan.next(self.now):
                pass
            for key in list(self.plan.in_flight):
                self.plan.ended(key, "answered", self.now)
                self.left.discard(key)
        assert not self.left


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=40)
