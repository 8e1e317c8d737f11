"""Scheduling policies against each other in the simulator: ours, baselines, bounds, ablations.

    python -m bench.policy [--quick] [--json] [--workload NAME ...] [--policy NAME ...] [--seed N]
                           [--traces DIR] [--gpus-for-99]
    python -m bench.policy --family 40 --out FILE.jsonl [--first-seed 201] [--runs 3] [--jobs 2]
                           [--policies lru,gdsf,ours] [--ours KEY=VALUE,...]
                           [--variant LABEL:KEY=VALUE,... ...] [--world KEY=VALUE,...]
    python -m bench.policy --of f201,arena-4 --out FILE.jsonl ...
    python -m bench.policy --table FILE ... [--names base,new] [--compare LABEL] [--by-workload]

Every policy leads the same simulated cluster: production agents, router admission, network, H100
nodes of 8 with 1 TiB of memory and 7 TB of disk, timings by runtime/sim/profile.py; only what
decides differs (bench/policies/). The first form runs four workloads
(bench/policies/workloads.py). The second runs a family of random ones (family.py), each for three
seeds of the simulation on small clusters of several kinds, into a file: what is there already is
not run again. `--of` names workloads: fSEED of the family, or those of special.py. Keys are fields
of scheduler/core/turn.py's Settings, or spec.FIELD of the models' specs: `--ours` for the policy
`ours`, `--variant` for one more under its own label (with those of `--ours`), `--world` for the
core of every policy. Two trees are compared by running both and giving both files to `--table`.

Figures are of requests that arrive after the warm-up; one that is never answered counts as HOLD_S.
A cold start is a replica that becomes hot, by the rung it came from: asleep-1, asleep-2 (a wake);
staged (page cache), cached (disk), remote (a start). GPU-hours *occupied*: devices on which a
replica starts, wakes, serves, drains or goes to sleep; *held*: bytes really held, in devices.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib import family_runs, family_table
from bench.lib.policy_runs import ABLATIONS, DISK, POLICIES, STARTS, Cluster, Figures, run
from bench.lib.report import Row, print_report
from bench.policies import workloads as w

BASELINES = ("lru", "knative", "locality")  # that share the cluster: the best of them counts
NAMED = [name for name in POLICIES if name not in ("gdsf", "lru-sleep", "belady")]
FAMILY = "lru,knative,locality,gdsf,belady,ours"


def run_named(one: w.Case, name: str, seed: int, gpus: int | None = None) -> Figures:
    """A policy on one of the four workloads, on its cluster or on so many GPUs."""
    if gpus is None:
        gpus = w.packed(one) if name == "dedicated" else one.gpus
    return run(one, name, (POLICIES | ABLATIONS)[name], Cluster(gpus), seed)


def gpus_for_99(one: w.Case, most: int, seed: int) -> Figures | None:
    """Ours on about the smallest cluster that answers 99 % within the objective, by bisection.

    None: not on `most` either. The end is known to one GPU in sixteen.
    """

    def tried(gpus: int) -> Figures:
        found = run_named(one, "ours", seed, gpus)
        print(f"  {one.name}: {gpus} GPUs: {found.within:.4f}", file=sys.stderr, flush=True)
        return found

    best = tried(most)
    if best.within < 0.99:
        return None
    too_few, enough = 0, most
    while enough - too_few > max(1, enough // 16):
        middle = (too_few + enough) // 2
        found = tried(middle)
        if found.within >= 0.99:
            best, enough = found, middle
        else:
            too_few = middle
    return best


def rows(found: dict[tuple[str, str], Figures]) -> list[Row]:
    """Ours against the best baseline of each figure, and against the bound."""
    made = []
    for name in dict.fromkeys(workload for workload, _ in found):
        of = {policy: f for (workload, policy), f in found.items() if workload == name}
        ours = of.get("ours")
        others = [of[b] for b in BASELINES if b in of]
        if ours is None:
            continue

        def row(
            what: str, figure: Callable[[Figures], float], target: str | None,
            ours: Figures = ours, others: list[Figures] = others, name: str = name,
        ) -> None:  # fmt: skip
            best = min(others, key=figure)
            made.append(Row(f"{name}: {what}", figure(ours), figure(best), best.policy, target))

        if others:
            row("TTFT p99, s", lambda f: f.p99_s, "<= 0.5")
            row("TTFT p95, s", lambda f: f.p95_s, None)
            row("TTFT mean, s", lambda f: f.mean_s, None)
            row("beyond 5 s, share", lambda f: 1 - f.within, None)
            row("starts from disk / 1,000", lambda f: f.cold(DISK), "<= 0.5")
            row("starts of any kind / 1,000", lambda f: f.cold(STARTS), None)
            row("GPU-hours occupied", lambda f: f.gpu_hours_occupied, None)
        if bound := of.get("clairvoyant"):
            made.append(
                Row(f"{name}: TTFT mean, s", ours.mean_s, bound.mean_s, bound.policy, "<= 1.25")
            )
        dedicated = of.get("dedicated")
        enough = of.get("ours, for 99 %")
        if dedicated and enough:
            made.append(
                Row(
                    f"{name}: GPU-hours for 99 % within 5 s", enough.gpu_hours_there,
                    dedicated.gpu_hours_there, dedicated.policy, "<= 0.2",
                )
            )  # fmt: skip
    return made


def table(found: list[Figures]) -> str:
    """All figures, as a table of Markdown."""
    lines = [
        "| policy | GPUs | TTFT mean | p50 | p95 | p99 | within 5 s | asleep-1 | asleep-2 | staged"
        " | cached | remote | GPU-h occupied | held | unanswered |",
        "| --- " * 15 + "|",
    ]
    for f in found:
        rungs = " | ".join(f"{f.by_rung.get(r, 0):.1f}" for r in ("asleep-1", "asleep-2", *STARTS))
        lines.append(
            f"| {f.policy} | {f.gpus} | {f.mean_s:.2f} | {f.p50_s:.3f} | {f.p95_s:.2f} |"
            f" {f.p99_s:.1f} | {100 * f.within:.2f} % | {rungs} | {f.gpu_hours_occupied:.1f} |"
            f" {f.gpu_hours_held:.1f} | {f.requests - f.answered} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    o = _options()
    try:
        if o.table:
            _print_table(o)
        elif o.family or o.of:
            _family(o)
        else:
            _named(o)
    except family_runs.Mistake as mistake:
        sys.exit(f"bench/policy.py: {mistake}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = parser.add_argument_group("the four workloads")
    named.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    named.add_argument("--workload", nargs="+", choices=w.NAMES, default=list(w.NAMES))
    named.add_argument("--policy", nargs="+", choices=[*POLICIES, *ABLATIONS])
    named.add_argument(
        "--gpus-for-99", action="store_true", help="fewest GPUs for 99 %% within 5 s"
    )
    named.add_argument("--seed", type=int, default=1)
    named.add_argument("--quick", action="store_true", help="small clusters, 10 minutes")
    named.add_argument("--json", action="store_true")
    named.add_argument("--save", type=Path, help="write all figures to this file, as JSON lines")
    many = parser.add_argument_group("the family")
    many.add_argument("--family", type=int, metavar="N", help="so many workloads")
    many.add_argument("--first-seed", type=int, default=201)
    many.add_argument("--of", metavar="NAME,...", help="these workloads in place of --family")
    many.add_argument("--policies", default=FAMILY, metavar="NAME,...")
    many.add_argument("--ours", metavar="KEY=VALUE,...")
    many.add_argument("--variant", action="append", default=[], metavar="LABEL:KEY=VALUE,...")
    many.add_argument("--world", default="", metavar="KEY=VALUE,...")
    many.add_argument("--runs", type=int, default=3, help="seeds of the simulation a workload")
    many.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    many.add_argument("--out", type=Path, help="the file of cells")
    shown = parser.add_argument_group("the table of such files")
    shown.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    shown.add_argument("--names", default="", metavar="NAME,...", help="of the files' trees")
    shown.add_argument("--compare", metavar="LABEL", help="compare every policy with this one")
    shown.add_argument("--by-workload", action="store_true", help="each workload's figures too")
    o = parser.parse_args()
    if (o.family or o.of) and not o.out:
        parser.error("--family and --of need --out FILE")
    return o


def _family(o: argparse.Namespace) -> None:
    seeds = range(o.first_seed, o.first_seed + (o.family or 0))
    workloads = o.of.split(",") if o.of else [f"f{seed}" for seed in seeds]
    for name in workloads:
        family_runs.check_name(name)
    found = family_runs.variants(o.policies, o.ours, o.variant)
    world = family_runs.parse_settings(o.world)
    family_runs.run_all(family_runs.cells(workloads, found, o.runs, world), o.out, o.jobs)
    o.table = [o.out]
    _print_table(o)


def _print_table(o: argparse.Namespace) -> None:
    """Files of one name are one tree's cells."""
    names = o.names.split(",") if o.names else [""] * len(o.table)
    if len(names) != len(o.table):
        raise family_runs.Mistake(f"--names has {len(names)} names for {len(o.table)} files")
    lines: dict[str, list[family_table.Line]] = {}
    for name, path in zip(names, o.table, strict=True):
        if not path.exists():
            raise family_runs.Mistake(f"there is no file {path}")
        lines.setdefault(name, []).extend(family_runs.read(path))
    trees = [family_table.Named(n, family_table.Results(found)) for n, found in lines.items()]
    print(family_table.table(trees, o.compare))
    if o.by_workload:
        print(family_table.by_workload(trees))


def _named(o: argparse.Namespace) -> None:
    names = o.policy or ([*NAMED] if o.quick else [*NAMED, *ABLATIONS])
    found: dict[tuple[str, str], Figures] = {}
    for workload in o.workload:
        one = w.case(workload, o.traces, o.seed, o.quick)
        if not o.json:
            print(_about(one), flush=True)
        for name in names:
            found[workload, name] = f = run_named(one, name, o.seed)
            print(
                f"  {name}: {f.wall_s:.0f} s, mean {f.mean_s:.2f} p95 {f.p95_s:.2f} p99"
                f" {f.p99_s:.1f}, violations {f.violations}", file=sys.stderr, flush=True,
            )  # fmt: skip
        if o.gpus_for_99 and (workload, "dedicated") in found:
            enough = gpus_for_99(one, found[workload, "dedicated"].gpus, o.seed)
            if enough is not None:
                found[workload, "ours, for 99 %"] = enough
        of_it = {policy: f for (name, policy), f in found.items() if name == workload}
        if not o.json:
            print(table(list(of_it.values())))
        if o.save:
            with o.save.open("a") as file:
                for policy, f in of_it.items():
                    file.write(json.dumps(asdict(f) | {"policy": policy}) + "\n")
    print_report("bench/policy.py", rows(found), o.json)


def _about(one: w.Case) -> str:
    return (
        f"\n{one.name}: {len(one.sizes)} models, {len(one.workload.arrivals)} requests in"
        f" {one.workload.duration_s:.0f} s, {one.gpus} GPUs; models called within 60 s take"
        f" {100 * w.working_set(one, 60):.0f} % of the memory"
    )


if __name__ == "__main__":
    main()
