"""Route rules: what is refused, in words, and how weights change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.contract.route_rules import (
    model_problems,
    names,
    parse_rule,
    place_problems,
    uses,
    with_share,
)
from runtime.contract.schema import SchemaError
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import RouteRule, RouteTarget

A, B = {"model": "a", "weight": 3}, {"model": "b", "weight": 1}


def spec(name: str, *aliases: str) -> ModelSpec:
    return ModelSpec(name=name, source="/m", aliases=aliases)


MODELS = {s.name: s for s in (spec("a"), spec("b", "org/b"), spec("c"))}


def refused(**fields: object) -> str:
    with pytest.raises(SchemaError) as caught:
        parse_rule({"name": "r", "targets": [A, B], **fields})
    return str(caught.value)


def placed(rules: tuple[RouteRule, ...] = (), **fields: object) -> list[str]:
    made = parse_rule({"name": "r", "targets": [A, B], **fields})
    return [str(p) for p in place_problems(made, MODELS, rules)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stiky": "user"}, "did you mean 'sticky'?"),
        ({"sticky": "cookie"}, "header:NAME"),
        ({"targets": []}, "targets: "),
        ({"targets": [{"model": "a", "weight": -1}]}, "targets[0].weight: "),
        ({"targets": [{"model": "a", "version": "v1"}]}, "targets[0].version: "),
        ({"targets": [A, A]}, "targets[1].model: is given twice (got 'a'); drop one"),
        (
            {"targets": [{**A, "version": "1.0.0"}, {**B, "version": "1.0.0"}]},
            "targets[1].version: is given twice",
        ),
        ({"targets": [{"model": "a", "weight": 0}]}, "give one a weight above 0"),
        ({"fallback": ["c", "c"]}, "fallback[1]: is given twice"),
        ({"mirror": {"model": "a"}}, "mirror.model: is a target already (got 'a')"),
        ({"mirror": {"model": "c", "share": 0}}, "mirror.share: "),
        ({"canary": {"model": "c"}}, "choose one of: a, b"),
        ({"canary": {"model": "a", "steps": [50, 5]}}, "e.g. [5, 25, 50]"),
        ({"canary": {"model": "a", "steps": [5, 100]}}, "canary.steps"),
        ({"canary": {"model": "a"}, "targets": [A]}, "serves now a weight above 0"),
    ],
)
def test_a_bad_rule_is_refused_with_the_field_and_the_fix(fields: dict, words: str) -> None:
    assert words in refused(**fields)


def test_all_problems_are_named_at_once() -> None:
    text = refused(targets=[A, A], fallback=["c", "c"], canary={"model": "z"})
    assert len(text.splitlines()) == 3


def test_a_rule_names_models_that_exist_by_their_own_names() -> None:
    assert placed() == []
    (problem,) = placed(fallback=["org/b".replace("/", "-")])
    assert "fallback[0]: is not a model's name (got 'org-b')" in problem
    assert "did you mean 'b'?" in placed(targets=[A, {"model": "B"}])[0]
    assert "add the model first" in placed(mirror={"model": "zzz"})[0]


def test_a_name_means_one_thing() -> None:
    made = {s.name: s for s in (*MODELS.values(), spec("d", "r@1"))}
    pinned = parse_rule({"name": "r", "targets": [{**A, "version": "1.0.0"}]})
    (problem,) = place_problems(pinned, made, ())
    assert "is already a name of model 'd'" in str(problem)
    assert "'a'" in str(place_problems(parse_rule({"name": "a", "targets": [B]}), MODELS, ())[0])
    assert place_problems(pinned, MODELS, (pinned,)) == []  # it may be put again
    assert [p.field for p in model_problems(spec("r", "r@1.0", "x"), (pinned,))] == [
        "name", "aliases",
    ]  # fmt: skip
    assert "route 'r'" in str(model_problems(spec("r"), (pinned,))[0])


def test_what_a_rule_uses() -> None:
    made = parse_rule({"name": "r", "targets": [A], "fallback": ["c"], "mirror": {"model": "b"}})
    assert uses(made) == {"a", "b", "c"}


def test_a_canary_begins_with_its_first_step() -> None:
    made = parse_rule({"name": "r", "targets": [A, B], "canary": {"model": "b", "steps": [10, 60]}})
    assert [t.weight for t in made.targets] == [90, 10]
    assert parse_rule_again(made) == made


def parse_rule_again(made: RouteRule) -> RouteRule:
    import msgspec

    return parse_rule(msgspec.to_builtins(made))


@given(st.lists(st.floats(0.01, 1e4), min_size=2, max_size=6), st.floats(0, 100))
def test_a_share_is_what_was_asked_and_the_others_keep_their_proportions(
    weights: list[float], share: float
) -> None:
    targets = tuple(RouteTarget(model=f"m{i}", weight=w) for i, w in enumerate(weights))
    after = with_share(RouteRule(name="r", targets=targets), "m0", share).targets
    assert sum(t.weight for t in after) == pytest.approx(100)
    assert after[0].weight == share
    rest = sum(weights[1:])
    for target, before in zip(after[1:], weights[1:], strict=True):
        assert target.weight == pytest.approx((100 - share) * before / rest)


def test_the_highest_release_of_a_line_has_its_short_name() -> None:
    targets = tuple(
        RouteTarget(model=m, version=v)
        for m, v in {"a": "1.9.0", "b": "1.10.0", "c": "1.11.0-rc.1", "d": "1.10.0+x"}.items()
    )
    found = {n: t and t.model for n, t in names(RouteRule(name="r", targets=targets)).items()}
    assert found["r"] is None
    assert found["r@1.9"] == "a"
    assert found["r@1.11.0-rc.1"] == "c"
    assert found["r@1.10.0+x"] == "d"
    assert found["r@1"] in {"b", "d"}
    assert "r@1.11" not in found
