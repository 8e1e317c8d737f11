"""What the router says of a model, with the fields that vLLM's own list has. Pure.

Rule this file keeps: each name that a caller may use is an entry of its own, as with vLLM's
`--served-model-name`; the first of a model is its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from runtime.wire.routes import ModelRoute

CREATED = 1735689600  # OpenAI's clients want a time; a model here has none worth telling


def card(route: ModelRoute, name: str) -> dict[str, Any]:
    """The card of `name`: the model's name, an alias or an adapter."""
    adapter = name in route.adapters
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "stoker",
        "root": name if adapter else route.root or route.name,
        "parent": route.name if adapter else None,
        "max_model_len": route.max_model_len,
        "permission": [_permission(name)],
        "warmth": route.warmth,
        "aliases": () if adapter else route.aliases,
    }


def names(route: ModelRoute, name: str) -> tuple[str, ...]:
    """The names by which a scope may allow `name` of `route`: an adapter by its own too."""
    own = (route.name, *route.aliases)
    return (name, *own) if name in route.adapters else own


def listing(
    routes: Iterable[ModelRoute], sees: Callable[[tuple[str, ...]], bool]
) -> dict[str, Any]:
    """All cards of which `sees` says that the caller may know; it gets all names of each."""
    cards = [
        card(route, name)
        for route in routes
        for name in (route.name, *route.aliases, *route.adapters)
        if sees(names(route, name))
    ]
    return {"object": "list", "data": cards}


def _permission(name: str) -> dict[str, Any]:
    """What OpenAI's first clients wanted, and vLLM still sends."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": CREATED,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
