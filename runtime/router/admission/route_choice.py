"""Which model a request meets that asked for a route: all that the router decides there. Pure.

Rules this file keeps:
- a name that is no route's costs one look-up;
- sticky callers are spread by weighted rendezvous hashing: each target scores -log(u) / weight, u
  a hash of route, target and key, and the least wins. So a target gets its share of the keys, and
  changing a weight moves only the keys which that target gains or loses;
- only a refusal before the answer's first byte, and not one for which the caller is to blame, goes
  on to the next model of the chain;
- counts only grow, as long as the route is there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from runtime.contract.route_rules import names
from runtime.wire.routes import Mirror, ModelRoute, RouteRule, RouteTarget, TargetCounts

# What is said of a model that can't be had: another one may do. A timeout is not among these: its
# caller has waited long, and the model works on it.
FALLS_BACK = frozenset(
    {
        "model_not_found",
        "model_unavailable",
        "queue_full",
        "shed",
        "not_in_time",
        "hold_timeout",
        "replica_failed",
        "retry_budget_spent",
    }
)


@dataclass(slots=True)
class Tally:
    """What became of one route's requests at one model, since the router started."""

    requests: int = 0
    errors: int = 0
    first_bytes: int = 0
    first_byte_s: float = 0.0

    def ended(self, status: int, first_byte_s: float | None, whole: bool) -> None:
        """A request is over. Not `whole`: its answer broke off.

        `first_byte_s`: from sent to the first byte of a body; None: none came. Then only a 5xx is
        counted: our own 4xx, and a caller who hung up (499), say nothing of the model.
        """
        if first_byte_s is not None:
            self.first_bytes += 1
            self.first_byte_s += first_byte_s
        if status >= 500 or (first_byte_s is not None and status != 499):
            self.requests += 1
            self.errors += status >= 500 or not whole


@dataclass(slots=True, frozen=True)
class Attempt:
    """One model that is tried for a request which asked for a route."""

    route: str
    asked: str  # the caller's word: the route's name, or NAME@VERSION
    tally: Tally
    again: bool = False  # another one was tried before
    spare: bool = False  # if it can't be had, another is tried, though comments went out


class Way:
    """One name of a route, made ready: where its requests go."""

    __slots__ = ("_bounds", "_targets", "_versions", "fallback", "mirror", "route", "sticky")

    def __init__(self, rule: RouteRule, pinned: RouteTarget | None = None) -> None:
        self.route = rule.name
        targets = [pinned] if pinned else [t for t in rule.targets if t.weight]
        self._targets = targets
        self._versions = {t.model: t.version for t in rule.targets if t.version}
        self._bounds = list(accumulate(1.0 if pinned else t.weight for t in targets))
        self.sticky = "off" if pinned or len(targets) == 1 else rule.sticky
        # Who asks for a version by its number is not given another one.
        self.fallback: tuple[str, ...] = () if pinned else rule.fallback
        self.mirror: Mirror | None = None if pinned else rule.mirror

    def choose(self, key: str | None, draw: float) -> str:
        """The target's model: by `key` where there is one, else by `draw`, uniform in [0, 1)."""
        if key is not None and len(self._targets) > 1:
            return min(self._targets, key=lambda t: self._score(t, key)).model
        at = draw * self._bounds[-1]
        for target, bound in zip(self._targets, self._bounds, strict=True):
            if at < bound:
                return target.model
        return self._targets[-1].model  # a draw that rounding took to the very end

    def chain(self, model: str) -> tuple[str, ...]:
        """`model` and those that may stand in for it, in order."""
        return (model, *(name for name in self.fallback if name != model))

    def version(self, model: str) -> str:
        """The version that `model` is of the route; "": it has none."""
        return self._versions.get(model, "")

    def heaviest(self) -> str:
        """The model that most requests meet."""
        return max(self._targets, key=lambda t: t.weight).model

    def _score(self, target: RouteTarget, key: str) -> float:
        text = f"{self.route}\0{target.model}\0{key}".encode(errors="surrogatepass")
        digest = int.from_bytes(blake2b(text, digest_size=7).digest(), "big")  # 56 bits
        return -math.log((digest + 0.5) / 2**56) / target.weight


class Versions:
    """One router's routes and what it counted by them."""

    def __init__(self) -> None:
        self.ways: dict[str, Way] = {}
        self.mirrors_dropped: Counter[str] = Counter()  # by route
        self._rules: tuple[RouteRule, ...] = ()
        self._tallies: dict[tuple[str, str], Tally] = {}

    def take(self, rules: tuple[RouteRule, ...]) -> None:
        """Go by these rules from now on."""
        if rules == self._rules:
            return
        self._rules = rules
        self.ways = {n: Way(r, target) for r in rules for n, target in names(r).items()}
        listed = {rule.name for rule in rules}
        for route, model in [key for key in self._tallies if key[0] not in listed]:
            del self._tallies[route, model]

    def tally(self, route: str, model: str) -> Tally:
        """Where to count a request of `route` for `model`."""
        key = (route, model)
        known = self._tallies.get(key)
        if known is None:
            known = self._tallies[key] = Tally()
        return known

    def counts(self) -> tuple[TargetCounts, ...]:
        """Everything counted, for the scheduler."""
        return tuple(
            TargetCounts(
                route=route, model=model, requests=t.requests, errors=t.errors,
                first_bytes=t.first_bytes, first_byte_s=t.first_byte_s,
            )
            for (route, model), t in self._tallies.items()
        )  # fmt: skip

    def listed(self, models: Iterable[ModelRoute]) -> list[ModelRoute]:
        """Every route as if it were a model, as warm as its heaviest target."""
        warmth = {route.name: route.warmth for route in models}
        shown = []
        for rule in self._rules:
            others = tuple(name for name in names(rule) if name != rule.name)
            heaviest = self.ways[rule.name].heaviest()
            shown.append(
                ModelRoute(name=rule.name, aliases=others, warmth=warmth.get(heaviest, "cold"))
            )
        return shown
