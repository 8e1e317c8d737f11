"""The table of a family of workloads: each policy as a ratio to the best simple baseline. Pure.

Of each workload and policy, the median over the seeds of the simulation of the mean and of the p99
of TTFT. A ratio is taken over the seeds that the policy and all baselines have. A baseline's own
ratio is to the best of the other baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

SIMPLE = ("lru", "knative", "locality", "gdsf")
BOUND = "belady"
ALIKE = 1.02  # a ratio up to this counts as no worse
LEAST = 1e-3  # seconds: smaller ones are alike

Line = Mapping[str, Any]  # a cell, as bench/lib/family_runs.py writes it


@dataclass(frozen=True)
class Score:
    """One policy on one workload, over several seeds."""

    mean_s: float
    p99_s: float
    unanswered: int  # in all


@dataclass(frozen=True)
class Against:
    """One policy on one workload against the best of some others."""

    workload: str
    mean: float
    p99: float
    score: Score
    fewest_unanswered: int  # of the best of the others


class Results:
    """All cells of one tree, by policy."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._by: dict[tuple[str, str], dict[int, Line]] = {}
        self.traits: dict[str, Mapping[str, Any]] = {}
        for line in lines:
            self._by.setdefault((line["workload"], line["policy"]), {})[line["seed"]] = line
            self.traits[line["workload"]] = line.get("traits", {})
        self.workloads = sorted(self.traits, key=_in_order)
        self.policies = list(dict.fromkeys(policy for _, policy in self._by))

    def seeds(self, workload: str, policy: str) -> set[int]:
        """Those it was run with."""
        return set(self._by.get((workload, policy), ()))

    def score(self, workload: str, policy: str, seeds: Iterable[int]) -> Score:
        """Over these seeds."""
        found = [self._by[workload, policy][seed] for seed in seeds]
        return Score(
            median(line["mean_s"] for line in found),
            median(line["p99_s"] for line in found),
            sum(line["unanswered"] for line in found),
        )

    def violations(self, policy: str) -> int:
        """In all its runs."""
        cells = [
            c for (_, name), by_seed in self._by.items() if name == policy for c in by_seed.values()
        ]
        return sum(line.get("violations", 0) for line in cells)


def _in_order(workload: str) -> tuple[str, int]:
    letters = workload.rstrip("0123456789")
    return letters, int(workload[len(letters) :] or 0)


def against(own: Results, policy: str, rivals: Sequence[tuple[Results, str]]) -> list[Against]:
    """A policy against the best of `rivals` on each workload that all of them have run."""
    found = []
    for workload in own.workloads:
        seeds = own.seeds(workload, policy)
        for results, rival in rivals:
            seeds &= results.seeds(workload, rival)
        if not seeds or not rivals:
            continue
        score = own.score(workload, policy, seeds)
        others = [results.score(workload, rival, seeds) for results, rival in rivals]
        found.append(
            Against(
                workload,
                _ratio(score.mean_s, min(other.mean_s for other in others)),
                _ratio(score.p99_s, min(other.p99_s for other in others)),
                score,
                min(other.unanswered for other in others),
            )
        )
    return found


def _ratio(own_s: float, best_s: float) -> float:
    return max(own_s, LEAST) / max(best_s, LEAST)


# ------------------------------------------------------------------------------- as text


@dataclass(frozen=True)
class Named:
    """Results under the name of their tree; "": there is only one."""

    name: str
    results: Results

    def label(self, policy: str) -> str:
        """A policy of this tree, as the table calls it."""
        return f"{self.name}:{policy}" if self.name else policy


def table(trees: Sequence[Named], compare: str | None = None) -> str:
    """By policy, in Markdown. `compare`: a policy's label that all others are compared with; of
    several trees each policy is compared with the same one of the first tree where none is given.
    """
    titles = [
        "policy", "n", "mean / best: median", "geo", "worst", f"<= {ALIKE}",
        "p99 / best: median", "geo", "worst", f"<= {ALIKE}",
        f"mean / {BOUND}: median", "<= 1.1", f"mean / {compare or 'first tree'}: median", "geo",
        "unanswered", "more than best on", "violations",
    ]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for tree in trees:
        for policy in tree.results.policies:
            lines.append("| " + " | ".join(_row(trees, tree, policy, compare)) + " |")
    return "\n".join(lines)


def _row(trees: Sequence[Named], tree: Named, policy: str, compare: str | None) -> list[str]:
    simple = against(tree.results, policy, _baselines(trees, tree, policy))
    bound = against(tree.results, policy, _of(trees, tree, BOUND) if policy != BOUND else [])
    other = against(tree.results, policy, _compared(trees, tree, policy, compare))
    return [
        tree.label(policy), str(len(simple)),
        *_spread([one.mean for one in simple]), *_spread([one.p99 for one in simple]),
        _shown(median, [one.mean for one in bound]), _share([one.mean for one in bound], 1.1),
        _shown(median, [one.mean for one in other]),
        _shown(geometric_mean, [one.mean for one in other]),
        str(sum(one.score.unanswered for one in simple)),
        str(sum(one.score.unanswered > one.fewest_unanswered for one in simple)),
        str(tree.results.violations(policy)),
    ]  # fmt: skip


def _baselines(trees: Sequence[Named], tree: Named, policy: str) -> list[tuple[Results, str]]:
    """The simple baselines but for the policy itself: of its own tree, or the first that has it."""
    return [pair for name in SIMPLE if name != policy for pair in _of(trees, tree, name)]


def _of(trees: Sequence[Named], tree: Named, policy: str) -> list[tuple[Results, str]]:
    for one in (tree, *trees):
        if policy in one.results.policies:
            return [(one.results, policy)]
    return []


def _compared(
    trees: Sequence[Named], tree: Named, policy: str, compare: str | None
) -> list[tuple[Results, str]]:
    if compare is None:
        first = trees[0]
        return (
            [(first.results, policy)]
            if tree is not first and policy in first.results.policies
            else []
        )
    for one in trees:
        for name in one.results.policies:
            if one.label(name) == compare and (one is not tree or name != policy):
                return [(one.results, name)]
    return []


def _spread(ratios: list[float]) -> list[str]:
    return [_shown(f, ratios) for f in (median, geometric_mean, max)] + [_share(ratios, ALIKE)]


def _shown(of: Callable[[list[float]], float], ratios: list[float]) -> str:
    return f"{of(ratios):.2f}" if ratios else ""


def _share(ratios: list[float], most: float) -> str:
    return f"{100 * sum(r <= most for r in ratios) / len(ratios):.0f} %" if ratios else ""


def by_workload(trees: Sequence[Named]) -> str:
    """What each workload is like, and every policy's mean / p99 on it."""
    lines = []
    for workload in dict.fromkeys(w for tree in trees for w in tree.results.workloads):
        traits = next(t.results.traits[workload] for t in trees if workload in t.results.traits)
        lines.append(f"{workload}: " + ", ".join(f"{k} {v}" for k, v in traits.items()))
        found = []
        for tree in trees:
            for policy in tree.results.policies:
                if seeds := tree.results.seeds(workload, policy):
                    score = tree.results.score(workload, policy, seeds)
                    found.append(f"{tree.label(policy)} {score.mean_s:.2f} / {score.p99_s:.1f}")
        lines.append("    " + "; ".join(found))
    return "\n".join(lines)
