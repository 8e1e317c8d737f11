"""Route rules: read and checked, the names they answer to, and their weights changed. Pure.

Rules this file keeps:
- a name means one thing: a rule never answers to a name of a model or of another rule;
- a rule names models by their own names, so that a request sent on by it meets no other rule;
- reweighing changes the share of one target; those of the others keep their proportions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from runtime.contract.schema import SchemaError, check, close_names
from runtime.wire.agent_messages import SpecProblem
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import Canary, RouteRule, RouteTarget

LEAST = 1e-6  # the least sum of weights: below it their ratios drown in rounding
WHOLE = 100.0  # what weights add up to once they were set by a canary or a switch


def parse_rule(raw: object) -> RouteRule:
    """A rule from an already parsed document. Raises SchemaError with every problem.

    A rule with a canary gets the weights of the canary's first step.
    """
    rule = check(raw, RouteRule)
    problems = list(_own_problems(rule))
    if problems:
        raise SchemaError(problems)
    if rule.canary is None:
        return rule
    return with_share(rule, rule.canary.model, rule.canary.steps[0])


def names(rule: RouteRule) -> dict[str, RouteTarget | None]:
    """Every name the rule answers to: its own (None: by weight), and NAME@VERSION.

    Example: versions 1.2.0 and 1.10.0 give `@1.2.0`, `@1.10.0`, `@1.2`, `@1.10`, and `@1` for the
    highest, 1.10.0. A pre-release is meant only by its whole version.
    """
    found: dict[str, RouteTarget | None] = {rule.name: None}
    released = [t for t in rule.targets if t.version and "-" not in t.version.split("+")[0]]
    for target in sorted(released, key=_precedence):
        major, minor, _ = _precedence(target)
        found[f"{rule.name}@{major}"] = target
        found[f"{rule.name}@{major}.{minor}"] = target
    found |= {f"{rule.name}@{t.version}": t for t in rule.targets if t.version}
    return found


def with_share(rule: RouteRule, model: str, share: float) -> RouteRule:
    """The rule with `share` per cent for `model`; the others share the rest as before."""
    others = sum(t.weight for t in rule.targets if t.model != model)
    count = len(rule.targets) - 1
    rest = WHOLE - share

    def weight(target: RouteTarget) -> float:
        if target.model == model:
            return share
        return rest * target.weight / others if others else rest / count

    targets = (msgspec.structs.replace(t, weight=weight(t)) for t in rule.targets)
    return msgspec.structs.replace(rule, targets=tuple(targets))


def without_canary(rule: RouteRule) -> RouteRule:
    """The rule with its weights as they are, and nothing under way."""
    return msgspec.structs.replace(rule, canary=None)


def uses(rule: RouteRule) -> frozenset[str]:
    """Every model that the rule names."""
    more = {rule.mirror.model} if rule.mirror else set()
    return frozenset({t.model for t in rule.targets} | set(rule.fallback) | more)


def place_problems(
    rule: RouteRule, models: Mapping[str, ModelSpec], rules: Iterable[RouteRule]
) -> list[SpecProblem]:
    """What is wrong with a rule beside these models and the other rules."""
    problems = list(_unknown_models(rule, models))
    taken = {n: f"model {spec.name!r}" for spec in models.values() for n in spec.names()}
    for other in rules:
        if other.name != rule.name:
            taken |= dict.fromkeys(names(other), f"route {other.name!r}")
    for name in names(rule):
        if name in taken:
            problems.append(
                SpecProblem(
                    field="name", value=name, message=f"is already a name of {taken[name]}",
                    fix="choose another",
                )
            )  # fmt: skip
    return problems


def model_problems(spec: ModelSpec, rules: Iterable[RouteRule]) -> list[SpecProblem]:
    """A problem for each name of a model that a rule answers to already."""
    taken = {name: rule.name for rule in rules for name in names(rule)}
    return [
        SpecProblem(
            field="name" if name == spec.name else "aliases", value=name,
            message=f"is already a name of route {taken[name]!r}",
            fix="choose another, or remove the route first",
        )
        for name in spec.names()
        if name in taken
    ]  # fmt: skip


def _precedence(target: RouteTarget) -> tuple[int, int, int]:
    major, minor, patch = (target.version or "").partition("+")[0].split(".")
    return int(major), int(minor), int(patch)


def _own_problems(rule: RouteRule) -> Iterator[SpecProblem]:
    yield from _twice("targets[{}].model", (t.model for t in rule.targets))
    yield from _twice("targets[{}].version", (t.version for t in rule.targets))
    yield from _twice("fallback[{}]", iter(rule.fallback))
    if sum(t.weight for t in rule.targets) < LEAST:
        yield SpecProblem(
            field="targets", message="have no weight at all", fix="give one a weight above 0"
        )
    targets = {t.model: t for t in rule.targets}
    if rule.mirror is not None and rule.mirror.model in targets:
        yield SpecProblem(
            field="mirror.model", value=rule.mirror.model, message="is a target already",
            fix="mirror to another model, or take it out of the targets",
        )  # fmt: skip
    if rule.canary is not None:
        yield from _canary_problems(rule.canary, targets)


def _twice(field: str, values: Iterable[str | None]) -> Iterator[SpecProblem]:
    seen: set[str | None] = {None}
    for index, value in enumerate(values):
        if value in seen and value is not None:
            yield SpecProblem(
                field=field.format(index), value=value, message="is given twice", fix="drop one"
            )
        seen.add(value)


def _canary_problems(canary: Canary, targets: Mapping[str, RouteTarget]) -> Iterator[SpecProblem]:
    if canary.model not in targets:
        yield SpecProblem(
            field="canary.model", value=canary.model, message="is not a target of this route",
            fix=f"add it to targets with weight 0, or choose one of: {', '.join(targets)}",
        )  # fmt: skip
    elif sum(t.weight for t in targets.values() if t.model != canary.model) < LEAST:
        yield SpecProblem(
            field="targets", message="but the canary's have no weight",
            fix="give the version that serves now a weight above 0",
        )  # fmt: skip
    if list(canary.steps) != sorted(set(canary.steps)):
        yield SpecProblem(
            field="canary.steps", value=list(canary.steps), message="do not grow",
            fix="write them from small to large, e.g. [5, 25, 50]",
        )  # fmt: skip


def _unknown_models(rule: RouteRule, models: Mapping[str, ModelSpec]) -> Iterator[SpecProblem]:
    named = [(f"targets[{i}].model", t.model) for i, t in enumerate(rule.targets)]
    named += [(f"fallback[{i}]", name) for i, name in enumerate(rule.fallback)]
    named += [("mirror.model", rule.mirror.model)] if rule.mirror else []
    for field, name in named:
        if name not in models:
            yield SpecProblem(
                field=field, value=name, message="is not a model's name", fix=_meant(name, models)
            )


def _meant(name: str, models: Mapping[str, ModelSpec]) -> str:
    alias_of = next((s.name for s in models.values() if name in s.aliases), None)
    close = [alias_of] if alias_of else close_names(name, models)
    return f"did you mean {close[0]!r}?" if close else "add the model first"
