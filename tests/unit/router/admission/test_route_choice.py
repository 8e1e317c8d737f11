"""Routes in the router: the pure choice of a target, its shares and its stickiness."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.contract.route_rules import LEAST, with_share
from runtime.router.admission import refusals
from runtime.router.admission.route_choice import FALLS_BACK, Versions, Way
from runtime.wire.routes import Mirror, ModelRoute, RouteRule, RouteTarget, TargetCounts

KEYS = [f"user-{n}" for n in range(2000)]


def rule(*weights: float, name: str = "r", **fields: Any) -> RouteRule:
    targets = tuple(RouteTarget(model=f"m{i}", weight=w) for i, w in enumerate(weights))
    return RouteRule(name=name, targets=targets, **fields)


def by_key(made: RouteRule) -> dict[str, str]:
    way = Way(made)
    return {key: way.choose(key, 0.0) for key in KEYS}


# ------------------------------------------------------------------------------ shares


@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=6).filter(lambda w: sum(w) >= LEAST),
    st.integers(1, 400),
)
def test_draws_that_cover_the_line_give_each_target_its_share(
    weights: list[float], count: int
) -> None:
    way = Way(rule(*weights))
    seen = Counter(way.choose(None, (n + 0.5) / count) for n in range(count))
    for index, weight in enumerate(weights):
        expected = count * weight / sum(weights)
        assert abs(seen[f"m{index}"] - expected) <= 1
        assert weight or not seen[f"m{index}"]


def test_the_ends_of_the_draw_are_inside() -> None:
    way = Way(rule(1, 0, 3))
    assert way.choose(None, 0.0) == "m0"
    assert way.choose(None, 1.0 - 2**-53) == "m2"


def test_sticky_keys_are_spread_by_weight() -> None:
    seen = Counter(by_key(rule(70, 20, 10)).values())
    assert seen["m0"] == pytest.approx(1400, abs=100)
    assert seen["m1"] == pytest.approx(400, abs=80)
    assert seen["m2"] == pytest.approx(200, abs=60)


@given(
    st.lists(st.floats(0.1, 100), min_size=2, max_size=5), st.data(), st.floats(0, 100),
)  # fmt: skip
def test_a_changed_weight_moves_keys_only_to_or_from_its_target(
    weights: list[float], data: st.DataObject, changed: float
) -> None:
    index = data.draw(st.integers(0, len(weights) - 1))
    after = [*weights[:index], changed, *weights[index + 1 :]]
    ways = Way(rule(*weights)), Way(rule(*after))
    for key in KEYS[:200]:
        old, new = (way.choose(key, 0.0) for way in ways)
        if old != new:
            assert (new if changed > weights[index] else old) == f"m{index}"


def test_a_canary_that_grows_keeps_every_key_it_had() -> None:
    had: set[str] = set()
    for share in (5.0, 25.0, 50.0, 100.0):
        now = {k for k, m in by_key(with_share(rule(60, 40, 0), "m2", share)).items() if m == "m2"}
        assert had <= now
        had = now
    assert had == set(KEYS)


def test_stickiness_does_not_depend_on_the_draw_or_the_order_of_targets() -> None:
    made = rule(1, 2, 3)
    turned = RouteRule(name="r", targets=made.targets[::-1])
    for key in KEYS[:100]:
        found = {Way(r).choose(key, draw) for r in (made, turned) for draw in (0.0, 0.5, 0.99)}
        assert len(found) == 1


def test_two_routes_spread_the_same_keys_differently() -> None:
    one, other = by_key(rule(1, 1)), by_key(rule(1, 1, name="s"))
    assert 0.4 < sum(one[k] == other[k] for k in KEYS) / len(KEYS) < 0.6


# ------------------------------------------------------------------------------ names


def versioned(**fields: Any) -> RouteRule:
    versions = {"a": "1.2.0", "b": "1.10.0", "c": "2.0.0-rc.1"}
    targets = tuple(RouteTarget(model=m, version=v, weight=m == "a") for m, v in versions.items())
    return RouteRule(name="r", targets=targets, **fields)


def test_a_version_is_asked_for_by_number() -> None:
    versions = Versions()
    versions.take((versioned(fallback=("z",), mirror=Mirror(model="y"), sticky="user"),))
    found = {name: way.choose(None, 0.0) for name, way in versions.ways.items()}
    assert found == {
        "r": "a", "r@1": "b", "r@1.2": "a", "r@1.10": "b", "r@1.2.0": "a", "r@1.10.0": "b",
        "r@2.0.0-rc.1": "c",
    }  # fmt: skip
    pinned = versions.ways["r@1"]
    assert (pinned.chain("b"), pinned.mirror, pinned.sticky) == (("b",), None, "off")
    assert versions.ways["r"].chain("a") == ("a", "z")


def test_routes_are_listed_as_warm_as_most_of_their_requests_find_them() -> None:
    versions = Versions()
    versions.take((rule(1, 9),))
    models = [ModelRoute(name="m0", warmth="cold"), ModelRoute(name="m1", warmth="hot")]
    assert [(r.name, r.warmth) for r in versions.listed(models)] == [("r", "hot")]
    assert [r.warmth for r in versions.listed([])] == ["cold"]


# ------------------------------------------------------------------------------ counts


def test_counts_outlive_a_changed_rule_and_go_with_their_route() -> None:
    versions = Versions()
    versions.take((rule(1, 1), rule(1, name="s")))
    tally = versions.tally("r", "m0")
    tally.ended(200, 0.5, whole=True)
    tally.ended(503, None, whole=True)
    tally.ended(499, None, whole=True)
    tally.ended(429, None, whole=True)
    tally.ended(200, 0.25, whole=False)
    versions.tally("s", "m0").ended(404, None, whole=True)
    versions.take((rule(5, 1),))
    assert versions.counts() == (
        TargetCounts(
            route="r", model="m0", requests=3, errors=2, first_bytes=2, first_byte_s=0.75
        ),
    )  # fmt: skip
    assert set(versions.ways) == {"r"}


# ------------------------------------------------------------------------------ fallback


def test_whatever_admission_refuses_for_falls_back_once_there_is_a_table() -> None:
    """A new code has to be decided on."""
    tree = ast.parse(Path(refusals.__file__).read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    codes = {c.args[2] for c in calls if ast.unparse(c.func) == "Refused"}
    named = {
        c.value if isinstance(c, ast.Constant) else getattr(refusals, ast.unparse(c)) for c in codes
    }
    # The second is said of a replica that has the model, when the request has reached it.
    assert named - {"no_routes", "adapter_not_ready"} == FALLS_BACK
