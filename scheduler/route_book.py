"""The routes: kept in the registry, changed by operators, canaries and switches.

Rules this file keeps:
- one change at a time: stored first, then in force, then in the audit trail;
- what is under way (a canary's step, a pending switch) is stored with its rule, so that a new
  leader goes on; a canary's step is observed again by it;
- a switch changes no weight before its target is warm, and none at all if it is given up;
- it decides nothing about a canary: policy/route_canary.py does.
"""

from __future__ import annotations

import asyncio
import logging
import time

from msgspec import Struct
from msgspec.structs import replace

from runtime.contract.route_rules import (
    model_problems,
    place_problems,
    uses,
    with_share,
    without_canary,
)
from runtime.outside import decode
from runtime.registry.protocol import RegistryError
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import DemandReport, RouteRule
from scheduler.audit import AuditTrail
from scheduler.driver import Driver
from scheduler.errors import Conflict, Invalid, bad, unknown
from scheduler.policy.route_canary import Counts, Observed, judge
from scheduler.state import messages as m
from scheduler.state.cluster import Model
from scheduler.store import Store

log = logging.getLogger("stoker.scheduler")

TICK_S = 0.5
ASK_AGAIN_S = 5.0  # how often the target of a switch is asked for while it is not warm


class Switch(Struct, frozen=True, kw_only=True):
    """A switch that waits for its target. Times are unix seconds: they outlive a leader."""

    to: str
    replicas: int
    began_at: float
    deadline_at: float


class StoredRoute(Struct, frozen=True, kw_only=True):
    """A route as the registry keeps it."""

    rule: RouteRule
    step: int = 0  # of its canary
    switch: Switch | None = None


class RuleBook:
    """All routes of the cluster; only a leader's is in use.

    Every change raises Refused where it can't be made, RegistryError where it was not.
    """

    def __init__(self, store: Store, driver: Driver) -> None:
        self._store = store
        self._driver = driver
        self.audit = AuditTrail(store)
        self.observed = Observed()
        self.routes: dict[str, StoredRoute] = {}
        self.verdicts: dict[str, str] = {}  # route -> what its canary waits for
        self.changed_at: dict[str, float] = {}  # route -> when its counting began
        self.lock = asyncio.Lock()  # held while anything that a rule names may change
        self._asked_at: dict[str, float] = {}  # route -> when its switch's target was asked for

    async def load(self) -> tuple[RouteRule, ...]:
        """What is stored, for a new leader."""
        entries = await self._store.below("routes")
        self.routes = {}
        for entry in entries:
            try:
                stored = decode(entry.value, StoredRoute)
            except ValueError as error:
                log.error("stored route %s cannot be read and is left alone: %s", entry.key, error)
                continue
            self.routes[stored.rule.name] = stored
        self.observed, self.verdicts, self._asked_at = Observed(), {}, {}
        self.changed_at = dict.fromkeys(self.routes, self._driver.now())
        await self.audit.load()
        return self.rules()

    def rules(self) -> tuple[RouteRule, ...]:
        """The rules of all routes, by name."""
        return tuple(stored.rule for _, stored in sorted(self.routes.items()))

    def heard(self, report: DemandReport) -> None:
        """A router told what it counted."""
        self.observed.heard(report)

    def find(self, name: str) -> StoredRoute:
        """Raises NotFound."""
        stored = self.routes.get(name)
        if stored is None:
            raise unknown("route", name, list(self.routes))
        return stored

    # ------------------------------------------------------------------------- beside models

    def refuse_model(self, spec: ModelSpec) -> None:
        """Raises Conflict where a route has one of its names."""
        if problems := model_problems(spec, self.rules()):
            raise Conflict("\n".join(map(str, problems)), problems=tuple(problems))

    def refuse_removal(self, model: str) -> None:
        """Raises Conflict where a route names the model."""
        routes = [rule.name for rule in self.rules() if model in uses(rule)]
        if routes:
            named = ", ".join(map(repr, routes))
            message = f"model {model!r} is used by route {named}: change or remove that first"
            raise Conflict(message)

    # ------------------------------------------------------------------------- operators

    async def put(self, rule: RouteRule, who: str) -> bool:
        """Add or change a route; whatever was under way with it is over. True if it is new."""
        async with self.lock:
            models = {name: model.spec for name, model in self._models().items()}
            if problems := place_problems(rule, models, self.rules()):
                taken = any(p.field == "name" for p in problems)
                kind = Conflict if taken else Invalid
                raise kind("\n".join(map(str, problems)), problems=tuple(problems))
            old = self.routes.get(rule.name)
            reason = "added" if old is None else "changed"
            if old is not None and old.switch is not None:
                reason += f"; the switch to {old.switch.to} was called off"
            await self._keep(StoredRoute(rule=rule), "put", who, reason)
            return old is None

    async def remove(self, name: str, who: str) -> None:
        """Remove a route. Raises NotFound."""
        async with self.lock:
            old = self.find(name)
            await self._store.delete("routes", name)
            del self.routes[name]
            self._in_force()
            self._restart_counts(name)
            await self.audit.note(who, "remove", f"route {name}", "removed", old.rule)

    async def promote(self, name: str, who: str, reason: str) -> None:
        """The canary gets everything."""
        async with self.lock:
            stored = self.find(name)
            if stored.rule.canary is None:
                raise Conflict(f"route {name!r} has no canary to promote")
            await self._end_canary(stored, "promote", who, reason)

    async def rollback(self, name: str, who: str, reason: str) -> None:
        """The canary gets nothing any more, or a pending switch is called off."""
        async with self.lock:
            stored = self.find(name)
            if stored.switch is not None:
                text = f"the switch to {stored.switch.to} was called off: {reason}"
                await self._keep(replace(stored, switch=None), "rollback", who, text)
            elif stored.rule.canary is not None:
                await self._end_canary(stored, "rollback", who, reason)
            else:
                message = (
                    f"route {name!r} has neither a canary nor a pending switch; a switch that is"
                    " done is undone by switching back"
                )
                raise Conflict(message)

    async def switch(self, name: str, to: str, deadline_s: float, who: str) -> None:
        """Begin to warm `to`; it gets everything once as much of it is ready as serves now."""
        async with self.lock:
            stored = self.find(name)
            replicas = self._replicas_for(stored, to)
            now = time.time()
            pending = Switch(to=to, replicas=replicas, began_at=now, deadline_at=now + deadline_s)
            reason = f"warming {to}: {replicas} ready within {deadline_s:g} s"
            await self._keep(replace(stored, switch=pending), "switch", who, reason)
            self._ask_for(name, pending)

    def _replicas_for(self, stored: StoredRoute, to: str) -> int:
        """How many of `to` have to be ready. Raises Refused."""
        name, targets = stored.rule.name, {t.model: t for t in stored.rule.targets}
        if to not in targets:
            fix = f"add it with weight 0, or choose one of: {', '.join(targets)}"
            raise bad("to", to, f"is not a target of route {name!r}", fix)
        if stored.rule.canary is not None:
            raise Conflict(f"route {name!r} has a canary: promote it or roll it back first")
        if stored.switch is not None:
            message = f"route {name!r} is being switched to {stored.switch.to} already"
            raise Conflict(f"{message}: roll that back first")
        blue = [t.model for t in targets.values() if t.weight and t.model != to]
        if not blue:
            raise Conflict(f"route {name!r} sends everything to {to!r} already")
        models = self._models()
        needed = max(1, sum(len(models[b].ready()) for b in blue if b in models))
        most = models[to].spec.max_replicas if to in models else 0
        if needed > most:
            message = f"{needed} replicas serve now, and {to!r} may have {most}"
            raise Conflict(f"{message}: raise its max_replicas first")
        return needed

    # ------------------------------------------------------------------------- as time goes by

    async def follow(self) -> None:
        """Bring canaries and switches on, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            if not self._driver.leads or self._driver.core.state.recovering:
                continue
            try:
                async with self.lock:
                    for stored in list(self.routes.values()):
                        await self._bring_on(stored)
                    await self.audit.save()
            except RegistryError as error:
                log.warning("routes are as they were, the registry does not answer: %s", error)
            except Exception:
                log.exception("the routes could not be brought on")  # tried again, with the others

    async def _bring_on(self, stored: StoredRoute) -> None:
        if stored.switch is not None:
            await self._follow_switch(stored, stored.switch)
        elif stored.rule.canary is not None:
            await self._follow_canary(stored)

    async def _follow_canary(self, stored: StoredRoute) -> None:
        rule, canary = stored.rule, stored.rule.canary
        assert canary is not None
        new, old = self.observed.of(rule.name, canary.model), Counts()
        for target in rule.targets:
            if target.model != canary.model:
                old = old.plus(self.observed.of(rule.name, target.model))
        in_step_s = self._driver.now() - self.changed_at[rule.name]
        verdict = judge(canary, stored.step, in_step_s, new, old)
        self.verdicts[rule.name] = verdict.reason
        if verdict.action == "next":
            share = canary.steps[stored.step + 1]
            after = StoredRoute(
                rule=with_share(rule, canary.model, share), step=stored.step + 1
            )  # fmt: skip
            await self._keep(after, "step", "canary", f"{verdict.reason}; now {share:g} %")
        elif verdict.action != "hold":
            await self._end_canary(stored, verdict.action, "canary", verdict.reason)

    async def _end_canary(self, stored: StoredRoute, action: str, who: str, reason: str) -> None:
        canary = stored.rule.canary
        assert canary is not None
        share = 100.0 if action == "promote" else 0.0
        rule = without_canary(with_share(stored.rule, canary.model, share))
        await self._keep(StoredRoute(rule=rule), action, who, reason)

    async def _follow_switch(self, stored: StoredRoute, switch: Switch) -> None:
        name, green = stored.rule.name, self._models().get(switch.to)
        ready = len(green.ready()) if green else 0
        if ready >= switch.replicas:
            rule = with_share(stored.rule, switch.to, 100.0)
            took_s = time.time() - switch.began_at
            reason = f"{ready} of {switch.to} were ready after {took_s:.1f} s"
            await self._keep(StoredRoute(rule=rule), "switched", "switch", reason)
        elif time.time() >= switch.deadline_at:
            limit_s = switch.deadline_at - switch.began_at
            reason = f"{ready} of {switch.replicas} of {switch.to} were ready after {limit_s:g} s"
            if green is not None and (why := green.unfit or green.problem or green.waiting_for):
                reason += f": {why}"
            await self._keep(replace(stored, switch=None), "switch_failed", "switch", reason)
        elif self._driver.now() - self._asked_at.get(name, 0.0) >= ASK_AGAIN_S:
            self._ask_for(name, switch)

    def _ask_for(self, route: str, switch: Switch) -> None:
        """Have the target loaded, unless it has just failed and rests."""
        now, model = self._driver.now(), self._models().get(switch.to)
        if model is not None and model.blocked_until <= now:
            self._asked_at[route] = now
            asked = m.LoadAsked(now=now, model=switch.to, replicas=switch.replicas)
            self._driver.apply(asked)

    # ------------------------------------------------------------------------- inside

    async def _keep(self, stored: StoredRoute, action: str, who: str, reason: str) -> None:
        """Store it, put it in force, and note it."""
        name = stored.rule.name
        old = self.routes.get(name)
        await self._store.put(stored, "routes", name)
        self.routes[name] = stored
        self._in_force()
        self._restart_counts(name)
        self.changed_at[name] = self._driver.now()
        old_rule = old.rule if old else None
        await self.audit.note(who, action, f"route {name}", reason, old_rule, stored.rule)

    def _restart_counts(self, name: str) -> None:
        table = self._driver.table
        self.observed.restart(name, table.version if table else 0)
        for known in (self.verdicts, self.changed_at, self._asked_at):
            known.pop(name, None)

    def _in_force(self) -> None:
        self._driver.apply(m.RulesSet(now=self._driver.now(), rules=self.rules()))

    def _models(self) -> dict[str, Model]:
        return self._driver.core.state.models
