"""The route table as it was published last, and when there is a new one. Pure.

Rules this file keeps: only routes of models that something happened to are worked out again; a
table that says nothing new is not published.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from runtime.wire.routes import ModelRoute, RouteTable
from scheduler.core.turn import Turn
from scheduler.policy.model_routes import lost_urls, model_route, waiting_for
from scheduler.state import messages as m
from scheduler.state.cluster import Replica

VERSIONS_PER_TERM = 10**9


class Publisher:
    """Keeps each model's route, and publishes the table when one changed."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._routes: dict[str, ModelRoute] = {}
        self._route_names: list[str] = []  # sorted
        self._lost: tuple[str, ...] = ()  # as published last
        self._changed = False  # since then; outlives an event that the core failed on

    def begin_term(self) -> None:
        """Forget every route: a new leader works them out itself."""
        self._routes, self._route_names = {}, []

    def publish(self, now: float) -> None:
        """Work out the routes of what is dirty, and publish the table if it says anything new."""
        state, dirty = self._turn.state, self._turn.dirty
        unpublished = state.routes_version == state.term * VERSIONS_PER_TERM
        if not (dirty or state.rules_changed or unpublished or self._changed):
            return
        # A new leader says what it knows even if that is nothing.
        self._changed |= unpublished or state.rules_changed
        state.rules_changed = False
        if dirty and (lost := lost_urls(state)) != self._lost:
            self._lost, self._changed = lost, True
        for name in dirty:
            model = state.models.get(name)
            route = model_route(state, model, now) if model else None
            if route != self._routes.get(name):
                self._changed = True
                self._set_route(name, route)
        dirty.clear()
        if self._changed:
            self._changed = False
            state.routes_version += 1
            table = RouteTable(
                version=state.routes_version,
                models=tuple(map(self._routes.__getitem__, self._route_names)),
                rules=state.rules,
                lost=self._lost,
            )
            self._turn.out.append(m.Publish(table=table))

    def _set_route(self, name: str, route: ModelRoute | None) -> None:
        if route is None:
            if self._routes.pop(name, None) is not None:
                del self._route_names[bisect_left(self._route_names, name)]
            return
        if name not in self._routes:
            insort(self._route_names, name)
        self._routes[name] = route

    def refuses(self, name: str) -> bool:
        """Whether the published route refuses the model."""
        route = self._routes.get(name)
        return route is not None and route.refusal is not None

    def tell_turn(self, replica: Replica) -> None:
        """Let those who wait hear if it comes behind another one than they were told."""
        model, route = self._turn.state.models.get(replica.model), self._routes.get(replica.model)
        if model is None or route is None or route.endpoints:
            return
        if route.waiting_for != waiting_for(self._turn.state, model):
            self._turn.dirty.add(replica.model)
